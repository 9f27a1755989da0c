"""Shares of a sequence: every position is somebody's once, causal work comes out even, order is kept."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.config.parallel import ParallelConfig
from benthic.parallel.mesh import Seat
from benthic.parallel.sequence import Share

CPU = torch.device("cpu")
ranks = st.integers(1, 5)


@given(ranks, ranks, st.integers(1, 3))
def test_every_position_belongs_to_one_context_rank(context, tensor, size):
    length = 2 * context * tensor * size
    held = [Share(length, context, rank, tensor).positions(CPU) for rank in range(context)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert all(one.diff().gt(0).all() for one in held)


@given(st.integers(2, 6), st.integers(1, 3))
def test_every_context_rank_has_as_many_keys_to_look_at(context, size):
    shares = [Share(2 * context * size, context, rank) for rank in range(context)]
    assert len({sum(place + 1 for one in share.stretches for place in one) for share in shares}) == 1


@given(st.integers(2, 6), st.integers(1, 3))
def test_stretches_of_all_ranks_are_put_in_order(context, size):
    shares = [Share(2 * context * size, context, rank) for rank in range(context)]
    laid = [one for share in shares for one in share.stretches]
    assert [place for index in shares[0].order() for place in laid[index]] == list(range(2 * context * size))


@given(ranks, ranks, st.integers(1, 3), st.integers(0, 2))
def test_rows_that_count_are_those_with_a_token_so_far_ahead(context, tensor, size, depth):
    length = 2 * context * tensor * size
    shares = [Share(length, context, here, tensor, piece) for here in range(context) for piece in range(tensor)]
    assert sum(share.counted(depth) for share in shares) == length - depth
    for share in shares:
        piece = share.positions(CPU).chunk(tensor)[share.tensor_rank]
        assert (piece + depth < length).tolist() == [row < share.counted(depth) for row in range(len(piece))]


def test_values_are_selected_by_position():
    values = torch.arange(10, 17)[None]  # of the first 7 of 8 positions
    assert Share(8, 2, 0).select(values, -1).tolist() == [[10, 11, 16, -1]]
    assert Share(8, 2, 1).select(values, -1).tolist() == [[12, 13, 14, 15]]


def test_ranks_of_one_sequence_are_neighbours_and_tensor_ranks_the_nearest():
    layout = ParallelConfig(shard=2, context=2, tensor=2)
    seats = [Seat(layout, rank) for rank in range(8)]
    assert [seat.data_rank for seat in seats] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [seat.share(16).context_rank for seat in seats] == [0, 0, 1, 1] * 2
    assert [seat.share(16).tensor_rank for seat in seats] == [0, 1] * 4
    assert [seat.reader for seat in seats] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Seat(ParallelConfig(shard=8), 3).share(16) is None


def test_without_zero_shares_are_the_same():
    layout = ParallelConfig(shard=2, context=2, zero=0)
    assert [Seat(layout, rank).data_rank for rank in range(4)] == [0, 0, 1, 1]

"""The order of training: exact resume, ranks, epochs; and validation that reads everything once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.data import Loader, validation_batches
from benthic.errors import DataError

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def read(loader, sizes):
    return [loader.next_batch(size).tokens for size in sizes]


@given(before=SIZES, after=SIZES, seed=st.integers(0, 2**32))
def test_a_resumed_loader_continues_exactly(stream, before, after, seed):
    source = stream(40, 1, 61)
    whole = Loader(source, 7, seed)
    read(whole, before)
    resumed = Loader(source, 7, seed)
    resumed.load_state_dict(whole.state_dict())
    for left, right in zip(read(whole, after), read(resumed, after), strict=True):
        assert torch.equal(left, right)


@given(sizes=SIZES, others=SIZES)
def test_the_order_does_not_depend_on_batch_sizes(stream, sizes, others):
    source = stream(40, 1, 61)
    left = torch.cat(read(Loader(source, 7), sizes))
    right = torch.cat(read(Loader(source, 7), others))
    common = min(len(left), len(right))
    assert torch.equal(left[:common], right[:common])


@given(world=st.sampled_from([1, 2, 3, 6]), updates=st.integers(1, 5))
def test_ranks_share_one_order_whatever_their_number(stream, world, updates):
    source = stream(200)
    ranks = [Loader(source, 7, 1, rank, world) for rank in range(world)]
    alone = Loader(source, 7, 1)
    for _ in range(updates):
        together = torch.cat([rank.next_batch(6 // world).tokens for rank in ranks])
        assert torch.equal(together, alone.next_batch(6).tokens)
    assert {rank.position for rank in ranks} == {alone.position}


def test_a_run_resumes_on_another_number_of_ranks(stream):
    source = stream(200)
    alone = Loader(source, 7)
    alone.next_batch(6)
    second = Loader(source, 7, 0, rank=1, world_size=2)
    second.load_state_dict(alone.state_dict())
    assert torch.equal(second.next_batch(3).tokens, alone.next_batch(6).tokens[3:])


@pytest.mark.parametrize(("tokens", "length"), [(101, 10), (100, 10), (11, 10), (64, 7)])
def test_an_epoch_labels_every_token_once_but_what_fills_no_window(stream, tokens, length):
    loader = Loader(stream(tokens), length)
    for _ in range(3):
        labels = loader.next_batch(loader.windows).tokens[:, 1:].flatten().tolist()
        assert len(set(labels)) == len(labels) == tokens - tokens % length
    assert loader.epoch == 3


def test_windows_are_consecutive_tokens_around_the_ring(stream):
    batch = Loader(stream(101), 10).next_batch(50).tokens
    assert batch.dtype == torch.int64
    assert ((batch[:, 1:] - batch[:, :-1]) % 101 == 1).all()


def test_epochs_differ_in_order_and_in_cuts(stream):
    loader = Loader(stream(1000), 10)
    first, second = (loader.next_batch(loader.windows).tokens[:, 0] for _ in range(2))
    assert not torch.equal(first, second)
    assert int(first[0]) % 10 != int(second[0]) % 10


def test_documents_number_the_tokens(stream):
    source = stream(4, 1, 6, 30)
    for batch in (Loader(source, 5).next_batch(8), *validation_batches(source, 5, 3)):
        ends = np.cumsum([4, 1, 6, 30])
        expected = np.searchsorted(ends, batch.tokens.numpy(), side="right")
        assert batch.documents.dtype == torch.int64
        assert batch.documents.tolist() == expected.tolist()


@pytest.mark.parametrize("changed", [{"seed": 1}, {"sequence_length": 8}])
def test_resuming_over_something_else_is_refused(stream, changed):
    source = stream(100)
    state = Loader(source, 7, 0).state_dict()
    other = Loader(source, **({"sequence_length": 7, "seed": 0} | changed))
    name, value = next(iter(changed.items()))
    with pytest.raises(DataError, match=f"cannot resume the data order: {name} was {state[name]}, now it is {value}"):
        other.load_state_dict(state)


def test_a_state_is_a_few_numbers(stream):
    state = Loader(stream(100), 7).state_dict()
    assert state == {"tokens": 100, "sequence_length": 7, "seed": 0, "position": 0}


def test_too_little_data_says_the_numbers(stream):
    with pytest.raises(DataError, match=r"holds 10 tokens, less than one sequence of 10 and its label \(11\)"):
        Loader(stream(10), 10)


def test_wrong_ranks_and_batches_are_refused(stream):
    with pytest.raises(DataError, match=r"rank 2 is outside \[0, 2\)"):
        Loader(stream(100), 7, rank=2, world_size=2)
    with pytest.raises(DataError, match="a batch of 0 sequences was asked for"):
        Loader(stream(100), 7).next_batch(0)


@given(tokens=st.integers(2, 120), length=st.integers(1, 20), size=st.integers(1, 5), world=st.integers(1, 3))
def test_validation_labels_every_token_but_the_first_once(stream, tokens, length, size, world):
    source = stream(tokens)
    ranks = [validation_batches(source, length, size, rank, world) for rank in range(world)]
    labels = [label for rank in ranks for batch in rank for label in batch.tokens[:, 1:].flatten().tolist()]
    assert sorted(labels) == list(range(1, tokens))


def test_validation_is_in_the_order_of_the_text(stream):
    batches = list(validation_batches(stream(24), 5, 3))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(3, 6), (1, 6), (1, 4)]
    assert torch.cat([batch.tokens[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, 24))


def test_a_validation_split_of_one_token_is_refused(stream):
    with pytest.raises(DataError, match="holds 1 tokens; validation needs at least 2"):
        next(validation_batches(stream(1), 5, 3))

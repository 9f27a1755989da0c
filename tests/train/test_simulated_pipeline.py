"""Messages of a pipeline: each schedule's are those that its borders need, and what would hang is found."""

import pytest

from benthic.config.parallel import ParallelConfig
from benthic.errors import NumericsError
from benthic.train.simulated_pipeline import (
    Batch,
    Computation,
    Message,
    require_matching,
    require_progress,
)
from benthic.train.simulation import programs_of
from tests.train.small import small_model, small_run

DOWN, UP = Message("forward", 0, 0), Message("backward", 0, 0)


def programs(layout: str, micro_batches: int):
    config = small_run(
        model=small_model(num_hidden_layers=7),
        batch={"sequences": micro_batches, "micro_sequences": 1},
        parallel=ParallelConfig.parse(layout),
    )
    return programs_of(config)[micro_batches]


@pytest.mark.parametrize("micro_batches", [4, 8, 12])
@pytest.mark.parametrize(
    ("layout", "borders"),
    [
        ("pp=4", 3),
        ("pp=4,schedule=gpipe", 3),
        ("pp=4,schedule=interleaved,vp=2", 7),
        ("pp=4,schedule=zb1p", 3),
        ("pp=4,schedule=zbv", 6),
        ("pp=4,schedule=dualpipev", 6),
    ],
)
def test_every_schedule_sends_each_micro_batch_over_each_border_both_ways_and_ends(layout, borders, micro_batches):
    found = programs(layout, micro_batches)
    stages = len({one.stage for events in found.values() for one in events if isinstance(one, Computation)})
    owners = {one.stage: rank for rank, events in found.items() for one in events if isinstance(one, Computation)}
    require_matching(found, owners, micro_batches)
    require_progress(found, stages)
    sent = [message for events in found.values() for one in events if isinstance(one, Batch) for message in one.sent]
    assert len(sent) == len(set(sent)) == 2 * borders * micro_batches


def two_ranks():
    """One micro-batch through two ranks, and back."""
    return {
        0: [
            Computation("forward", 0, 0),
            Batch(sent=frozenset({DOWN})),
            Batch(received=frozenset({UP})),
            Computation("backward", 0, 0),
        ],
        1: [
            Batch(received=frozenset({DOWN})),
            Computation("forward", 1, 0),
            Computation("backward", 1, 0),
            Batch(sent=frozenset({UP})),
        ],
    }


def test_two_ranks_come_to_an_end():
    require_matching(two_ranks(), {0: 0, 1: 1}, 1)
    require_progress(two_ranks(), 2)


def test_messages_in_another_order_at_their_ends_are_ranks_that_wait_for_each_other():
    broken = two_ranks()
    broken[0][1:3] = reversed(broken[0][1:3])
    require_matching(broken, {0: 0, 1: 1}, 1)
    with pytest.raises(NumericsError) as error:
        require_progress(broken, 2)
    assert error.value.message == (
        "2 of 2 pipeline ranks wait for each other: rank 0 waits to receive gradients of micro-batch 0 from stage 1 to "
        "0; rank 1 waits to receive states of micro-batch 0 from stage 0 to 1"
    )


def test_messages_that_start_together_may_cross():
    crossing = two_ranks()
    later = Message("forward", 0, 1)
    crossing[0][2:3] = [Computation("forward", 0, 1), Batch(frozenset({later}), frozenset({UP}))]
    crossing[1][3:] = [Batch(frozenset({UP}), frozenset({later})), Computation("forward", 1, 1)]
    require_progress(crossing, 2)


def test_a_send_without_its_receive_is_found():
    broken = two_ranks()
    del broken[1][0]
    with pytest.raises(
        NumericsError, match="pipeline rank 1 receives the states of micro-batch 0 from stage 0 to 1 0 "
    ):
        require_matching(broken, {0: 0, 1: 1}, 1)


def test_a_micro_batch_that_a_stage_leaves_out_is_found():
    broken = two_ranks()
    del broken[1][2]
    with pytest.raises(NumericsError, match="pipeline rank 1: backward of stage 1 takes 0 micro-batches, not each of"):
        require_matching(broken, {0: 0, 1: 1}, 1)

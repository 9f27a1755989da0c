"""Bubbles and activations of the pipeline schedules against the DualPipe README's table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.pipeline import StageTime, bubble, chunks_in_flight, cut, cut_layers, steady

STAGE = StageTime(forward=1.0, backward=2.0, weight_gradient=0.9, overlapped=2.5)


@pytest.mark.parametrize(
    ("layout", "seconds"),
    [
        (ParallelConfig(pipeline=8), 7 * 3.0),
        (ParallelConfig(pipeline=8, schedule="interleaved", chunks=2), 7 * 3.0),
        (ParallelConfig(pipeline=8, schedule="zb1p"), 7 * (3.0 - 1.8)),
        (ParallelConfig(pipeline=8, schedule="gpipe"), 7 * 3.0),
        (ParallelConfig(pipeline=8, schedule="zbv"), 7 * (3.0 - 2.7)),
        (ParallelConfig(pipeline=8, schedule="dualpipe"), 3 * (2.5 + 2.0 - 2.7)),
        (ParallelConfig(pipeline=4, schedule="dualpipev"), 3 * (2.5 + 2.0 - 2.7)),
        (ParallelConfig(), 0.0),
    ],
)
def test_bubbles_are_the_published_ones(layout, seconds):
    stage = STAGE if "dual" in layout.schedule else StageTime(1.0, 2.0, 0.9)
    assert bubble(layout, stage)[0] == pytest.approx(seconds)


def test_a_bubble_explains_itself_with_its_numbers():
    text = bubble(ParallelConfig(pipeline=16, schedule="dualpipe"), STAGE)[1]
    assert text == "(16 / 2 - 1) (FB + B - 3 W), F 1 s, B 2 s, W 0.9 s, FB 2.5 s"


@given(ranks=st.sampled_from([2, 4, 8, 16]), forward=st.floats(0.1, 5), share=st.floats(0.1, 0.5))
def test_finer_schedules_wait_no_longer(ranks, forward, share):
    stage = StageTime(forward, 2 * forward, 2 * forward * share)
    plain = bubble(ParallelConfig(pipeline=ranks), stage)[0]
    assert bubble(ParallelConfig(pipeline=ranks, schedule="zb1p"), stage)[0] <= plain
    assert bubble(ParallelConfig(pipeline=ranks, schedule="dualpipe"), stage)[0] <= plain
    halves = StageTime(forward / 2, forward, forward * share)
    assert bubble(ParallelConfig(pipeline=ranks, schedule="interleaved", chunks=2), halves)[0] <= plain


def test_every_schedule_does_the_same_work():
    whole, half = StageTime(1.0, 2.0, 0.9), StageTime(0.5, 1.0, 0.45)
    assert steady(ParallelConfig(pipeline=4), whole, 8) == 24
    assert steady(ParallelConfig(pipeline=4, schedule="interleaved", chunks=2), half, 8) == 24
    assert steady(ParallelConfig(pipeline=4, schedule="dualpipev"), half, 8) == 24
    assert steady(ParallelConfig(pipeline=4, schedule="dualpipe"), whole, 8) == 24


@pytest.mark.parametrize(
    ("layout", "rank", "chunks"),
    [
        (ParallelConfig(pipeline=8), 0, 8),
        (ParallelConfig(pipeline=8), 7, 1),
        (ParallelConfig(pipeline=8, schedule="zb1p"), 3, 5),
        (ParallelConfig(pipeline=4, schedule="zb1p", chunks=2), 0, 8),
        (ParallelConfig(pipeline=8, schedule="zbv"), 3, 16),
        (ParallelConfig(pipeline=8, schedule="gpipe"), 7, 100),
        (ParallelConfig(pipeline=8, schedule="dualpipe"), 5, 9),
        (ParallelConfig(pipeline=4, schedule="dualpipev"), 2, 9),
        (ParallelConfig(pipeline=4, schedule="interleaved", chunks=2), 0, 11),
        (ParallelConfig(pipeline=4, schedule="interleaved", chunks=2), 3, 5),
        (ParallelConfig(), 0, 1),
    ],
)
def test_micro_batches_in_flight_are_the_published_ones(layout, rank, chunks):
    assert chunks_in_flight(layout, rank, 100) == chunks


def test_prediction_layers_are_not_parted():
    config = ModelConfig.from_pretrained("deepseek-v3").replace(num_nextn_predict_layers=3)
    stages = cut_layers(config, [1.0] * 64, 16)
    assert [layer for stage in stages for layer in stage] == list(range(64))
    assert len(stages) == 16
    assert {61, 62, 63} <= set(stages[-1])


def test_no_more_is_in_flight_than_there_is():
    assert chunks_in_flight(ParallelConfig(pipeline=8), 0, 3) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_a_cut_is_contiguous_complete_and_as_even_as_can_be(costs, stages):
    if stages > len(costs):
        with pytest.raises(ConfigError, match=f"cannot cut {len(costs)} layers into {stages} stages"):
            cut(costs, stages)
        return
    ranges = cut(costs, stages)
    assert [i for one in ranges for i in one] == list(range(len(costs)))
    assert len(ranges) == stages
    assert all(ranges)
    assert max(sum(costs[i] for i in one) for one in ranges) == _best(tuple(costs), stages)


def _best(costs: tuple[int, ...], stages: int) -> int:
    if stages == 1:
        return sum(costs)
    return min(max(sum(costs[:n]), _best(costs[n:], stages - 1)) for n in range(1, len(costs) - stages + 2))

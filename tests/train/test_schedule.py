"""Schedules: DeepSeek-V3's own numbers (arXiv:2412.19437, section 4.2) at the places where the paper states them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config.train import BatchConfig, Phase, Schedule
from benthic.errors import ConfigError
from benthic.train.schedule import Place, planned_tokens, sequences_at, value
from tests.train.small import small_run

TRILLION, BILLION = 10**12, 10**9

V3_LEARNING_RATE = Schedule(
    peak=2.2e-4,
    start=0.0,
    phases=(
        Phase(shape="linear", until=2000, unit="steps", factor=1.0),
        Phase(shape="constant", until=10 * TRILLION, unit="tokens", factor=1.0),
        Phase(shape="cosine", until=14.3 * TRILLION, unit="tokens", factor=0.1),
        Phase(shape="constant", until=14.633 * TRILLION, unit="tokens", factor=0.1),
        Phase(shape="constant", until=14.8 * TRILLION, unit="tokens", factor=7.3e-6 / 2.2e-4),
    ),
)


@pytest.mark.parametrize(
    ("step", "tokens", "rate"),
    [
        (1, 0, 2.2e-4 / 2000),
        (1000, 12 * BILLION, 1.1e-4),
        (2000, 25 * BILLION, 2.2e-4),
        (2001, 25 * BILLION, 2.2e-4),
        (200_000, 10 * TRILLION, 2.2e-4),
        (220_000, 12.15 * TRILLION, (2.2e-4 + 2.2e-5) / 2),
        (240_000, 14.3 * TRILLION, 2.2e-5),
        (241_000, 14.5 * TRILLION, 2.2e-5),
        (242_000, 14.7 * TRILLION, 7.3e-6),
    ],
)
def test_learning_rate_of_deepseek_v3(step, tokens, rate):
    assert value(V3_LEARNING_RATE, Place(step, int(tokens), 250_000)) == pytest.approx(rate, rel=1e-9)


def test_batch_of_deepseek_v3_grows_from_3072_to_15360_over_469_billion_tokens():
    ramp = Phase(shape="linear", until=469 * BILLION, unit="tokens")
    schedule = Schedule(peak=15360, start=0.2, phases=(ramp,))
    sizes = [sequences_at(schedule, 64, Place(1, tokens * BILLION, 1)) for tokens in (0, 200, 469, 470, 14_000)]
    assert sizes == [3072, 8256, 15360, 15360, 15360]


def test_a_share_of_the_peak_that_is_a_whole_number_is_not_rounded_down():
    for peak in range(2, 100):
        for sequences in range(1, peak):
            schedule = Schedule(peak=peak, phases=(Phase(until=1, factor=sequences / peak),))
            assert sequences_at(schedule, 1, Place(1, 0, 2)) == sequences


def test_prediction_weight_falls_from_03_to_01_after_ten_trillion_tokens():
    first = Phase(until=10 * TRILLION, unit="tokens")
    schedule = Schedule(peak=0.3, phases=(first, Phase(until=14.8 * TRILLION, unit="tokens", factor=1 / 3)))
    weights = [value(schedule, Place(1, tokens * TRILLION, 1)) for tokens in (0, 10, 11, 14)]
    assert weights == pytest.approx([0.3, 0.3, 0.1, 0.1])


def test_phases_in_shares_of_the_run_keep_their_shape_when_the_run_is_shortened():
    phases = (Phase(shape="linear", until=0.5), Phase(shape="cosine", until=1, factor=0))
    schedule = Schedule(peak=1.0, start=0.0, phases=phases)
    for steps in (10, 1000):
        halves = [value(schedule, Place(int(steps * share), 0, steps)) for share in (0.2, 0.5, 1.0)]
        assert halves == pytest.approx([0.4, 1.0, 0.0], abs=1e-12)


@given(st.floats(0, 1), st.integers(1, 99))
def test_a_cosine_stays_between_its_ends_and_never_rises(factor, step):
    schedule = Schedule(peak=1.0, phases=(Phase(shape="cosine", until=100, unit="steps", factor=factor),))
    here, later = (value(schedule, Place(at, 0, 100)) for at in (step, step + 1))
    assert factor - 1e-12 <= later <= here + 1e-12 <= 1 + 2e-12


def test_planned_tokens_count_the_ramp():
    ramp = Schedule(peak=8, start=0.25, phases=(Phase(shape="linear", until=4, unit="steps"),))
    config = small_run(batch=BatchConfig(sequences=ramp, micro_sequences=2), steps=6)
    assert planned_tokens(config) == (2 + 4 + 6 + 8 + 8 + 8) * 16


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((Phase(until=0.5), Phase(until=0.4)), "must end one after another"),
        ((Phase(until=0.5), Phase(shape="cosine", until=100, unit="steps")), "where it starts is unknown"),
    ],
)
def test_phases_that_cannot_follow_one_another_are_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(peak=1.0, phases=phases)


def test_a_share_above_one_is_refused():
    with pytest.raises(ConfigError, match="a share of the run is at most 1"):
        Phase(until=2000)

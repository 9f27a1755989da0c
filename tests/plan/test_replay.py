"""DeepSeek-V3's run, predicted: within 15% of what was published, and nothing fitted to it."""

from __future__ import annotations

import inspect

import pytest

from benthic.plan import replay as module
from benthic.plan.devices import DEVICES
from benthic.plan.replay import PRETRAINING_TOKENS, replay


@pytest.fixture(scope="module")
def run():
    return replay()


def test_every_figure_lands_within_fifteen_percent_of_the_published_one(run):
    for comparison in run.comparisons:
        assert comparison.predicted == pytest.approx(comparison.published, rel=0.15), comparison.name


def test_published_figures_are_compared_with_and_never_computed_with(run):
    source = inspect.getsource(module)
    for name in ("PUBLISHED_HOURS_PER_TRILLION", "PUBLISHED_DOLLARS"):
        assert source.count(name) == 2
    assert run.hours("pretraining") == pytest.approx(
        sum(phase.tokens / phase.step.tokens * phase.step.total * 2048 / 3600 for phase in run.phases[:-2])
    )


def test_phases_hold_all_tokens_on_2048_gpus_that_have_the_memory(run):
    assert sum(phase.tokens for phase in run.phases if phase.name == "pretraining") == pytest.approx(PRETRAINING_TOKENS)
    for phase in run.phases:
        assert phase.layout.world == 2048
        assert phase.memory.total <= DEVICES["h800"].memory_bytes
        assert phase.step.tokens == phase.sequences * phase.training.sequence_length


def test_longer_sequences_take_the_context_parallelism_that_fits(run):
    assert [phase.layout.context for phase in run.phases[-3:]] == [1, 8, 32]


def test_small_batches_of_the_ramp_wait_longer_in_the_pipeline(run):
    shares = [phase.step.share("bubble") for phase in run.phases[:-2]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1 > 0.06 > shares[-1]


def test_effects_say_which_assumption_carries_the_difference(run):
    assert run.effects["kernels 10% slower than in the trace"] > 0.05
    assert run.effects["1F1B and no limit on nodes"] > run.effects["1F1B, nothing hidden"] > 0.2
    assert run.effects["perfectly balanced experts"] < 0 < run.effects["the fullest expert rank 20% above the mean"]
    assert any("trace" in text for text in run.assumptions)

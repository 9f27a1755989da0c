"""GPU-hours and dollars."""

from __future__ import annotations

import pytest

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.cost import training_cost
from benthic.plan.devices import DEVICES
from benthic.plan.training import Training
from benthic.plan.training_time import step_time

H200 = DEVICES["h200"]
STEP = step_time(ModelConfig.from_pretrained("deepseek-v2-lite"), Training(4096), H200)


def test_hours_are_tokens_over_pace_and_dollars_hours_times_price():
    cost = training_cost(STEP, 1e12, H200)
    assert cost.gpu_hours == pytest.approx(STEP.gpu_hours_per_trillion_tokens)
    assert cost.dollars == pytest.approx(cost.gpu_hours * H200.dollars_per_hour.value)
    assert cost.days == pytest.approx(cost.gpu_hours / 24)
    assert sum(cost.by_part.values()) == pytest.approx(cost.total)


def test_twice_the_tokens_cost_twice_as_much_and_a_given_price_is_used():
    assert training_cost(STEP, 2e12, H200).dollars == pytest.approx(2 * training_cost(STEP, 1e12, H200).dollars)
    cost = training_cost(STEP, 1e12, H200, dollars_per_hour=7.0)
    assert cost.dollars == pytest.approx(7 * cost.gpu_hours)
    assert "7.00 dollars a GPU-hour (as given)" in cost.assumptions


@pytest.mark.parametrize(("tokens", "price", "part"), [(0, None, "tokens is 0"), (1, -1, "dollars_per_hour is -1")])
def test_impossible_runs_and_prices_are_refused(tokens, price, part):
    with pytest.raises(ConfigError, match=part):
        training_cost(STEP, tokens, H200, price)

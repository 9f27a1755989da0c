"""Simulated expert load: conservation, limits, and what balancing does."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.expert_load import choose, simulate

V3 = ModelConfig.from_pretrained("deepseek-v3")
V2 = ModelConfig.from_pretrained("deepseek-v2")
TOKENS = 2048


@given(routing=st.sampled_from(["random", "skewed"]), seed=st.integers(0, 9), limit=st.booleans())
@settings(max_examples=10, deadline=None)
def test_every_choice_lands_on_one_expert_and_one_device(routing, seed, limit):
    load = simulate(V3, routing, tokens=256, seed=seed, group_limit=limit)
    assert sum(load.per_expert) == sum(load.per_device) == 256 * 8
    assert 1 <= load.nodes_per_token <= load.devices_per_token <= 8
    if limit:
        assert load.nodes_per_token <= 4


def test_the_same_seed_gives_the_same_load():
    assert simulate(V3, tokens=512, seed=3) == simulate(V3, tokens=512, seed=3)
    assert simulate(V3, tokens=512, seed=3) != simulate(V3, tokens=512, seed=4)


def test_balancing_takes_the_skew_away():
    skewed, balanced = (simulate(V3, routing, tokens=TOKENS) for routing in ("skewed", "balanced"))
    assert skewed.max_violation > 3
    assert balanced.max_violation < 0.6
    assert balanced.device_violation < 0.2
    assert balanced.idle_experts == 0


def test_devices_are_more_even_than_their_experts():
    load = simulate(V3, tokens=TOKENS)
    assert 0 < load.device_violation < load.max_violation


def test_v2_groups_are_kept_for_their_best_expert():
    scores = numpy.full((1, 160), 0.1)
    scores[0, [0, 20, 40]] = 0.9
    chosen = choose(V2, scores, numpy.zeros(160))
    assert {expert // 20 for expert in chosen[0].tolist()} == {0, 1, 2}


def test_v3_groups_are_kept_for_their_two_best_experts_and_the_bias():
    scores = numpy.full((1, 256), 0.1)
    scores[0, 0] = 0.9
    for group in range(1, 5):
        scores[0, group * 32 : group * 32 + 2] = 0.6
    assert {expert // 32 for expert in choose(V3, scores, numpy.zeros(256))[0].tolist()} == {1, 2, 3, 4}
    bias = numpy.zeros(256)
    bias[1] = 0.9
    assert 0 in {expert // 32 for expert in choose(V3, scores, bias)[0].tolist()}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"devices": 7}, "devices is 7; it must divide n_routed_experts (256)"),
        ({"devices": 8, "nodes": 16}, "nodes is 16; it must divide devices (8)"),
        ({"skew": -1.0}, "skew is -1.0; it must be at least 0"),
    ],
)
def test_wrong_sizes_are_refused_in_words(changes, part):
    with pytest.raises(ConfigError) as error:
        simulate(V3, **changes)
    assert part in str(error.value)


def test_a_dense_model_has_no_expert_load():
    with pytest.raises(ConfigError, match="no routed experts"):
        simulate(ModelConfig.from_pretrained("olmo2-7b"))

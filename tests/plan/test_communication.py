"""Traffic between ranks: exact expectations against enumeration and simulation, and V3's published numbers."""

from __future__ import annotations

from itertools import combinations

import pytest

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.communication import (
    BF16_ELEMENT,
    context_parallel_bytes,
    exchange_rows,
    expected_places,
    expert_exchange,
    forwarded_exchange,
    scatter_bytes,
    synchronisation_seconds,
    tensor_parallel_bytes,
)
from benthic.plan.devices import DEVICES
from benthic.plan.expert_load import simulate
from tests.plan.configs import SMALL

V3 = ModelConfig.from_pretrained("deepseek-v3")
V3_LAYOUT = ParallelConfig.parse("pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64")
H800 = DEVICES["h800"]


@pytest.mark.parametrize("places", [1, 2, 4, 8])
def test_expected_places_without_limit_are_those_of_all_draws(places):
    config = SMALL["v3"]
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    draws = [len({expert * places // experts for expert in draw}) for draw in combinations(range(experts), chosen)]
    assert expected_places(config, places, group_limit=False) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize("places", [4, 8, 16, 64])
@pytest.mark.parametrize("limit", [True, False])
def test_expected_places_agree_with_the_models_own_routing(places, limit):
    load = simulate(V3, tokens=4096, devices=places, nodes=1, group_limit=limit)
    assert expected_places(V3, places, limit) == pytest.approx(load.devices_per_token, rel=0.08)


def test_the_group_limit_keeps_a_token_of_v3_to_four_nodes():
    limited, free = expected_places(V3, 8), expected_places(V3, 8, group_limit=False)
    assert limited == 4
    assert free == pytest.approx(5.29, abs=0.01)


def test_places_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ConfigError, match="7 places do not divide the 256 routed experts"):
        expected_places(V3, 7)


def test_deepseek_s_exchange_goes_over_the_network_once_a_node():
    exchange = forwarded_exchange(V3, V3_LAYOUT, H800, 7168 * BF16_ELEMENT)
    assert exchange.network_bytes == pytest.approx(4 * 7 / 8 * 7168 * 2)
    without = forwarded_exchange(V3, V3_LAYOUT, H800, 7168 * BF16_ELEMENT, group_limit=False)
    assert without.network_bytes > 1.3 * exchange.network_bytes
    assert without.seconds(H800, 4096) > exchange.seconds(H800, 4096)


def test_the_trainer_s_exchange_sends_a_row_once_to_each_rank():
    exchange = expert_exchange(V3, V3_LAYOUT, H800, 100.0)
    assert exchange.network_bytes + exchange.node_bytes == pytest.approx(expected_places(V3, 64) * 63 / 64 * 100)
    assert exchange.network_bytes == pytest.approx(expected_places(V3, 64) * 56 / 64 * 100)


def test_tokens_travel_narrow_with_their_choices_and_the_rest_in_bfloat16():
    assert exchange_rows(V3, narrow=True) == {
        "tokens": 7168 + 4 * 56 + 8 * 8,
        "results": 2 * 7168,
        "gradients of results": 2 * 7168,
        "gradients of tokens": 2 * 7168 + 8 * 8,
    }


def test_one_node_sends_nothing_over_the_network():
    layout = ParallelConfig(shard=8, expert=8)
    exchange = expert_exchange(V3, layout, H800, 7168 * BF16_ELEMENT)
    assert exchange.network_bytes == 0
    assert exchange.node_bytes > 0
    assert expert_exchange(V3, ParallelConfig(), H800, 7168 * BF16_ELEMENT).node_bytes == 0


def test_sharding_costs_one_and_a_half_times_the_traffic_of_replication():
    size, gradients = 2e9, 2e9
    replicated = synchronisation_seconds(ParallelConfig(replicate=8), H800, 8, size, gradients, 1)[0]
    sharded = synchronisation_seconds(ParallelConfig(shard=8), H800, 8, size, gradients, 1)[0]
    assert sharded == pytest.approx(1.5 * replicated)
    assert synchronisation_seconds(ParallelConfig(), H800, 1, size, gradients, 1) == (0.0, "one copy")


def test_collectives_send_all_but_ones_own_share():
    assert scatter_bytes(100, 4) == 75
    assert tensor_parallel_bytes(V3, ParallelConfig(), 4096) == 0
    assert tensor_parallel_bytes(V3, ParallelConfig(tensor=2), 10) == 4 * 10 * 7168 * 2 / 2


def test_context_parallelism_sends_the_latent_and_not_the_heads():
    assert context_parallel_bytes(V3, ParallelConfig(context=4), 10) == 3 * 10 * 576 * 2

"""FLOPs: published figures, a counter over the real model, and what must hold for any model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benthic import ops
from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.model import LanguageModel, initialise
from benthic.model.cache import Cache
from benthic.ops import experts
from benthic.plan.flops import (
    decode_flops_per_token,
    forward_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from benthic.plan.operations import (
    backward_operations,
    decode_step,
    expected_experts,
    forward_operations,
    recomputed_operations,
    total_flops,
    whole_sequences,
)
from benthic.plan.parameters import count_parameters
from tests.plan.configs import SMALL, configs, drawn


def gigaflops(name, **options):
    return training_flops_per_token(ModelConfig.from_pretrained(name), 4096, **options) / 1e9


def test_v3_training_is_the_published_figure():
    assert round(gigaflops("deepseek-v3"), 1) == 250.5
    assert round(gigaflops("deepseek-v3", convention="full"), 1) == 281.2
    assert round(gigaflops("deepseek-v3", include_mtp=True) - gigaflops("deepseek-v3"), 1) == 10.2


def test_other_published_figures():
    assert round(gigaflops("deepseek-v2"), 1) == 155.3
    assert round(gigaflops("llama-3.1-405b"), 1) == 2473.2
    assert round(gigaflops("qwen2.5-72b"), 1) == 444.9


def matrix_flops(operations):
    """What a counter of matrix products sees: not norms, nor biases."""
    return sum(one.total_flops for one in operations if one.work != "memory")


@pytest.fixture
def grouped(monkeypatch):
    """The experts as on a GPU: one grouped product for all."""
    monkeypatch.setattr(ops, "routed_experts", experts._grouped)


def grouped_flops(left, right, *_, **__):
    return 2 * math.prod(left) * right[-1]


def count(function):
    """FLOPs of all products. torch counts neither grouped products nor the CPU's fused attention by itself."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


def build(config):
    torch.manual_seed(0)
    model = LanguageModel(config)
    initialise(model, 0)
    return model, torch.randint(0, config.vocab_size, (2, 12))


@pytest.mark.parametrize("name", SMALL)
def test_forward_equals_a_counter_over_the_real_model(name, grouped):
    model, tokens = build(SMALL[name])
    counted = count(lambda: model(tokens))
    assert counted == matrix_flops(forward_operations(SMALL[name], whole_sequences(2, 12, "full")))


@pytest.mark.parametrize("name", SMALL)
def test_training_equals_a_counter_over_forward_and_backward(name, grouped):
    model, tokens = build(SMALL[name])
    counted = count(lambda: model(tokens).sum().backward())
    forward = forward_operations(SMALL[name], whole_sequences(2, 12, "full"))
    assert counted == matrix_flops([*forward, *backward_operations(forward)])


def test_the_experts_loop_of_the_cpu_multiplies_as_much_as_the_grouped_product():
    config = SMALL["v3"]
    model, tokens = build(config)
    # Its weighted sum is a lookup (embedding_bag), which is no product to a counter or to the planner.
    counted = count(lambda: model(tokens))
    assert counted == matrix_flops(forward_operations(config, whole_sequences(2, 12, "full")))


def test_mtp_equals_a_counter_over_the_prediction_layer(grouped):
    config = SMALL["v3"]
    model, tokens = build(config)
    added = count(lambda: model(tokens, return_mtp=True)) - count(lambda: model(tokens))
    # The prediction layer runs on the S - 1 positions that have a token after the next.
    call = whole_sequences(2, 11, "full")
    with_mtp, without = (forward_operations(config, call, include_mtp=mtp) for mtp in (True, False))
    assert added == matrix_flops(with_mtp) - matrix_flops(without)


@pytest.mark.parametrize("name", ["v3", "v3 without query compression", "dense mha"])
def test_decode_equals_a_counter_over_the_cached_model(name, grouped):
    config = SMALL[name]
    model, tokens = build(config)
    cache = Cache(config, 2, 12)
    with torch.no_grad():
        model(tokens[:, :11], cache=cache)
        counted = count(lambda: model(tokens[:, 11:], cache=cache))
    assert counted == matrix_flops(forward_operations(config, decode_step(2, 12)))


@drawn
@given(configs(), st.integers(1, 64), st.integers(1, 4))
def test_forward_is_two_flops_a_parameter_and_the_attention_core(config, length, sequences):
    call = whole_sequences(sequences, length)
    heads = config.num_attention_heads * (config.query_head_dim + config.value_head_dim)
    core = 2 * config.num_hidden_layers * length / 2 * heads
    expected = call.tokens * (2 * count_parameters(config).active_without_input_embedding + core)
    assert total_flops(forward_operations(config, call)) == pytest.approx(expected, rel=1e-12)


@drawn
@given(configs(), st.integers(1, 64))
def test_conventions_differ_by_half_the_core_and_training_is_three_forwards(config, length):
    causal, full = (training_flops_per_token(config, length, one) for one in ("causal", "full"))
    heads = config.num_attention_heads * (config.query_head_dim + config.value_head_dim)
    assert full - causal == pytest.approx(3 * config.num_hidden_layers * length * heads)
    assert causal == pytest.approx(3 * forward_flops_per_token(config, length))
    call = whole_sequences(1, length)
    backward = total_flops(backward_operations(one for one in forward_operations(config, call) if one.work != "memory"))
    assert backward == pytest.approx(2 * matrix_flops(forward_operations(config, call)))


@drawn
@given(configs(), st.integers(1, 8), st.integers(1, 64))
def test_flops_do_not_depend_on_how_tokens_are_batched(config, sequences, length):
    one = forward_operations(config, whole_sequences(1, length))
    many = forward_operations(config, whole_sequences(sequences, length))
    assert total_flops(many) == pytest.approx(sequences * total_flops(one))


@drawn
@given(configs(), st.integers(1, 60))
def test_a_longer_context_costs_more(config, context):
    assert decode_flops_per_token(config, context + 1) > decode_flops_per_token(config, context)
    assert training_flops_per_token(config, context + 1) > training_flops_per_token(config, context)


@drawn
@given(configs())
def test_recomputing_more_costs_more_and_never_more_than_a_forward(config):
    steps = [recomputed_flops_per_token(config, 32, one) for one in ("none", "up_projections", "attention", "layer")]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] < forward_flops_per_token(config, 32)


def test_v3_recomputes_its_two_up_projections_and_its_norms():
    config = ModelConfig.from_pretrained("deepseek-v3")
    again = recomputed_operations(forward_operations(config, whole_sequences(1, 4096)), "up_projections")
    matrices = {one.name for one in again if one.work != "memory"}
    assert matrices == {"self_attn.q_b_proj again", "self_attn.kv_b_proj again"}


def test_absorbed_decode_of_v3():
    config = ModelConfig.from_pretrained("deepseek-v3")
    core = 2 * 61 * 4096 * 128 * (2 * 512 + 64)
    assert decode_flops_per_token(config, 4096) == 2 * 36_625_618_432 + core


@drawn
@given(st.integers(0, 3000))
def test_expected_experts_start_at_k_and_never_exceed_all(tokens):
    config = ModelConfig.from_pretrained("deepseek-v3")
    touched = expected_experts(config, tokens)
    assert 0 <= touched <= 256
    assert touched <= 8 * tokens + 1e-9


def test_expected_experts_of_a_dense_model_are_none():
    assert expected_experts(SMALL["dense mha"], 7) == 0


def test_weights_are_read_once_however_many_tokens():
    config = SMALL["dense mha"]
    one, many = (forward_operations(config, whole_sequences(n, 8)) for n in (1, 16))
    assert [a.weight_bytes for a in one] == [b.weight_bytes for b in many]


def test_float32_weights_are_computed_and_moved_in_float32():
    config = SMALL["v3"]
    wide, narrow = (forward_operations(config, whole_sequences(2, 8), weights) for weights in ("fp32", "bf16"))
    assert {one.precision for one in wide} == {"fp32"}
    assert total_flops(wide) == total_flops(narrow)
    bias = 4 * config.n_routed_experts * config.num_expert_layers
    moved = [sum(one.total_bytes for one in found) for found in (wide, narrow)]
    assert moved[0] - bias == pytest.approx(2 * (moved[1] - bias))


def test_refusals_name_the_value_and_what_is_allowed():
    config = SMALL["v3"]
    with pytest.raises(ConfigError, match=r"convention is 'half'; allowed: causal, full"):
        training_flops_per_token(config, 8, "half")
    with pytest.raises(ConfigError, match=r"sequence length is 0; it must be at least 1"):
        training_flops_per_token(config, 0)
    with pytest.raises(ConfigError, match=r"context is -1; it must be at least 1"):
        decode_flops_per_token(config, -1)
    with pytest.raises(ConfigError, match=r"recomputation is 'all'; allowed: none, up_projections, attention, layer"):
        recomputed_flops_per_token(config, 8, "all")

"""Serving: what fits, how long a token takes, and what must hold for any layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import find_device
from benthic.plan.inference import (
    Serving,
    decode,
    fewest_gpus,
    free_bytes_per_gpu,
    gpu_operations,
    largest_batch,
    longest_context,
    prefill,
    speculative_decode,
    weight_bytes_per_gpu,
)
from benthic.plan.operations import decode_step, forward_operations, total_flops
from benthic.plan.parameters import repeated_parameters, weight_bytes
from tests.plan.configs import SMALL, drawn

H200 = find_device("h200")
LITE, V3, QWEN = (ModelConfig.from_pretrained(name) for name in ("deepseek-v2-lite", "deepseek-v3", "qwen2.5-72b"))


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 1.15), (8, 4.22), (32, 7.16), (128, 8.16)])
def test_the_floor_of_a_lite_step_is_near_the_bytes_of_weights_it_reads(batch, milliseconds):
    """Weights met, once, at 4.3 TB/s: the estimate by hand that leaves activations out."""
    step = decode(LITE, Serving(H200), batch, 1024)
    assert step.seconds * 1e3 == pytest.approx(milliseconds, rel=0.07)


def test_v3_needs_eight_h200_or_sixteen_h800():
    serving = Serving(H200, attention="data", weights="fp8")
    assert fewest_gpus(V3, serving, 8, 4096) == 8
    assert fewest_gpus(V3, replace(serving, device=find_device("h800")), 8, 4096) == 16
    assert fewest_gpus(V3, replace(serving, device=find_device("cpu"), weights="bf16"), 8, 4096) is None


def test_weights_on_one_gpu_are_all_weights():
    for attention in ("tensor", "data"):
        assert weight_bytes_per_gpu(V3, Serving(H200, 1, attention, "fp8")) == weight_bytes(V3, "fp8")


def test_more_gpus_than_key_value_heads_hold_copies_of_them():
    """A rank of 16 holds what the smaller model with one key-value head would, save what no rank divides."""
    whole = {one.name: one for one in repeated_parameters(QWEN)}
    copied = [whole[f"self_attn.{name}_proj.{kind}"] for name in "kv" for kind in ("weight", "bias")]
    of_heads = sum(2 * one.count * one.row.size for one in copied)
    eight, sixteen = (weight_bytes_per_gpu(QWEN, Serving(H200, gpus)) for gpus in (8, 16))
    undivided = sum(2 * one.count * one.row.size for one in whole.values() if one.row.shard_axis is None)
    assert sixteen - undivided == pytest.approx((eight - undivided - of_heads / 8) / 2 + of_heads / 8, rel=1e-9)


def test_data_parallel_attention_keeps_more_weights_and_less_cache_on_a_gpu():
    tensor, data = (Serving(H200, 8, attention, "fp8") for attention in ("tensor", "data"))
    assert weight_bytes_per_gpu(V3, data) > weight_bytes_per_gpu(V3, tensor)
    assert largest_batch(V3, data, 4096) > largest_batch(V3, tensor, 4096)


def test_what_fits_fits_and_one_more_does_not():
    serving = Serving(H200, 8, "data", "fp8")
    free = free_bytes_per_gpu(V3, serving)
    context = longest_context(V3, serving)
    assert context * 70_272 <= free < (context + 1) * 70_272
    batch = largest_batch(V3, serving, 4096)
    assert longest_context(V3, serving, batch) >= 4096
    assert longest_context(V3, serving, batch + 8) < 4096


def test_nothing_fits_where_the_weights_do_not():
    serving = Serving(H200, 1, "tensor", "fp8")
    assert free_bytes_per_gpu(V3, serving) < 0
    assert longest_context(V3, serving) == largest_batch(V3, serving, 1) == 0


@drawn
@given(st.sampled_from([1, 2, 4]), st.sampled_from(["tensor", "data"]), st.integers(1, 9))
def test_the_gpus_together_do_the_model_s_work(gpus, attention, rows):
    config = SMALL["v3"]
    batch = rows * gpus
    call = decode_step(batch, 32)
    whole = [one for one in forward_operations(config, call) if one.part in ("routed", "shared", "dense", "head")]
    mine = gpu_operations(config, Serving(H200, gpus, attention), call)
    share = [one for one in mine if one.part in ("routed", "shared", "dense", "head")]
    assert total_flops(share) * gpus == pytest.approx(total_flops(whole))


@drawn
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_larger_batch_takes_longer_and_yields_more_a_second(first, second):
    small, large = sorted((first, second))
    serving = Serving(H200, 8, "tensor", "fp8")
    steps = [decode(V3, serving, batch, 4096) for batch in (small, large)]
    assert steps[0].seconds <= steps[1].seconds
    assert steps[0].tokens_per_second <= steps[1].tokens_per_second * (1 + 1e-9)


@drawn
@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_longer_context_is_never_faster(first, second):
    short, long = sorted((first, second))
    serving = Serving(H200, 8, "data", "fp8")
    assert decode(V3, serving, 64, short).seconds <= decode(V3, serving, 64, long).seconds
    assert prefill(V3, serving, 8, short).seconds <= prefill(V3, serving, 8, long).seconds
    assert largest_batch(V3, serving, short) >= largest_batch(V3, serving, long)


def test_no_draft_accepted_is_slower_and_all_accepted_is_faster():
    serving = Serving(H200, 8, "data", "fp8")
    plain = decode(V3, serving, 8, 4096).tokens_per_second
    rates = [speculative_decode(V3, serving, 8, 4096, p).tokens_per_second for p in (0.0, 0.85, 1.0)]
    assert rates[0] < plain < rates[1] < rates[2]
    assert speculative_decode(V3, serving, 8, 4096, 0.85).tokens == pytest.approx(8 * 1.85)
    assert speculative_decode(V3, serving, 8, 4096, 0.5, drafts=3).tokens == pytest.approx(8 * 1.875)


def test_one_gpu_has_no_communication_and_several_have():
    assert decode(LITE, Serving(H200), 8, 1024).communication_seconds == 0
    for attention in ("tensor", "data"):
        assert decode(LITE, Serving(H200, 8, attention), 8, 1024).communication_seconds > 0


def test_crossing_nodes_is_slower_than_staying_in_one():
    inside, across = (Serving(H200, gpus, "data", "fp8") for gpus in (8, 64))
    times = [decode(V3, one, 64 * one.gpus, 4096).communication_seconds for one in (inside, across)]
    assert times[0] < times[1]


def test_refusals_name_the_value_and_what_is_allowed():
    with pytest.raises(ConfigError, match=r"gpus is 0; it must be at least 1"):
        decode(V3, Serving(H200, 0), 1, 8)
    with pytest.raises(
        ConfigError, match=r"gpus is 3; it must divide n_routed_experts \(256\)\nhint: allowed: 1, 2, 4"
    ):
        decode(V3, Serving(H200, 3), 1, 8)
    with pytest.raises(ConfigError, match=r"gpus is 3; tensor-parallel .* divide num_attention_heads \(64\)"):
        decode(QWEN, Serving(H200, 3), 1, 8)
    with pytest.raises(ConfigError, match=r"attention is 'pipeline'; allowed: tensor, data"):
        decode(QWEN, Serving(H200, 1, "pipeline"), 1, 8)
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers is 0; speculation needs a prediction layer"):
        speculative_decode(QWEN, Serving(H200, 2), 1, 8, 0.9)
    with pytest.raises(ConfigError, match=r"acceptance is 1.5; allowed: 0 to 1"):
        speculative_decode(V3, Serving(H200, 8), 1, 8, 1.5)
    with pytest.raises(ConfigError, match=r"batch is 0; it must be at least 1"):
        longest_context(V3, Serving(H200, 8), 0)
    with pytest.raises(ConfigError, match=r"context is 0; it must be at least 1"):
        largest_batch(V3, Serving(H200, 8), 0)

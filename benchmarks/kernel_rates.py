"""Rates of single kernels at a training setting's shapes, each measured alone and never within a step."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic import ops
from benthic.config.model import ModelConfig
from benthic.kernels import (
    cross_entropy,
    latent_heads,
    permutation,
    quantise,
    retile,
    rms_norm,
    rotary,
    swiglu,
    swiglu_fp8,
)
from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8
from benthic.kernels.grouped_weight_gradient_fp8 import grouped_weight_gradient_fp8
from benthic.numerics.reference.adamw import Rule
from benthic.ops.adamw import adamw, gradient_norms
from benthic.ops.permutation import Permutation, sort_by_expert
from benthic.ops.rotary import RotaryTable
from benthic.plan.communication import FP8_ELEMENT
from benthic.plan.devices import DEVICES, Device, MemoryWork, Precision, Rate, Work
from benthic.plan.layer_time import GROUPED_TILE, attention_backward_products
from benthic.plan.training import Training

Rates = dict[tuple[Work, Precision], Rate]
SOURCE = "this run, the setting's shapes"
Measured = tuple[MemoryWork, float, Callable[[], object]]
"""A kind of memory-bound kernel, the bytes that one call reads and writes, and the call."""


def seconds_of(work: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of one call among many launched one after another: the median of three rounds."""
    for _ in range(3):
        work()
    found = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(found)


def with_measured_rates(device: Device, config: ModelConfig, training: Training) -> Device:
    """`device` with rates measured now; what this setting does not run keeps the device file's."""
    rates = dict(device.measured) | _matmul_rates(config, training) | _attention_rates(training, config)
    if config.n_routed_experts:
        rates |= _grouped_rates(config, training)
    kinds = dict(device.measured_bandwidth)
    for kind, moved, work in _memory_kernels(config, training):
        kinds[kind] = Rate(moved / seconds_of(work), SOURCE)
        del work
        gc.collect()
        torch.cuda.empty_cache()
    return replace(
        device,
        measured=rates,
        memory_bandwidth=_copy_bandwidth(),
        measured_bandwidth=kinds,
        launch_seconds=_launch_interval(),
    )


def _copy_bandwidth() -> Rate:
    large = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    copied = torch.empty_like(large)
    return Rate(2 * large.nbytes / seconds_of(lambda: copied.copy_(large)), "copy of 2 GiB, this run")


def _launch_interval() -> Rate:
    """The time of a kernel that does nothing worth mentioning, in a stream of them."""
    one = torch.zeros(1, device="cuda")
    return Rate(seconds_of(lambda: one.add_(1), 1000), "adding 1 to one number, 1000 in a row, this run")


def _drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def _memory_kernels(config: ModelConfig, training: Training) -> Iterator[Measured]:
    """A kernel of each kind, as the trainer calls it; both passes where there are two."""
    tokens, width = training.micro_batch * training.sequence_length, config.hidden_size
    x = _drawn(tokens, width)
    yield "elementwise", 3 * x.nbytes, lambda: x + x
    yield _norm(x)
    yield _heads(config, training)
    yield from _casts(x)
    yield from _embedding(config, x)
    yield _loss(config, training)
    yield _optimizer(training)
    gradients = [_drawn(1 << 24) for _ in range(16)]
    yield "reduction", sum(one.nbytes for one in gradients), lambda: gradient_norms(gradients)
    yield _rows(config, x) if config.n_routed_experts else _gated(config, tokens)
    if config.n_routed_experts:
        yield _gated_rows(config, tokens)
    if training.precision == "fp8":
        yield from _quantisation(config, x)


def _norm(x: Tensor) -> Measured:
    gain, grad = torch.ones_like(x[0]), torch.randn_like(x)

    def both_passes() -> None:
        total, _, inverse = rms_norm.add_rms_norm(x, grad, gain, 1e-6)
        rms_norm.add_rms_norm_backward(grad, x, total, gain, inverse)

    return "norm", 8 * x.nbytes, both_passes


def _heads(config: ModelConfig, training: Training) -> Measured:
    """Latent attention's heads, or the rotation of plain ones."""
    shape = (training.micro_batch, training.sequence_length)
    rotations = RotaryTable(config).rows(0, shape[1], torch.device("cuda"))
    query = _drawn(*shape, config.num_attention_heads, config.query_head_dim)
    if not config.kv_lora_rank:
        return "heads", 2 * query.nbytes, lambda: rotary.rotary(query, rotations, config.rope_interleave)
    own, value = config.qk_nope_head_dim, config.v_head_dim
    expanded = _drawn(*shape, config.num_attention_heads, own + value)
    turning, grad_value = _drawn(*shape, config.qk_rope_head_dim), _drawn(*shape, config.num_attention_heads, value)

    def both_passes() -> None:
        turned, key = latent_heads.latent_heads(query, expanded, turning, rotations, config.rope_interleave)
        latent_heads.latent_heads_backward(turned, key, grad_value, rotations, config.rope_interleave)

    keys = 2 * query[..., :own].numel() * query.element_size()
    return "heads", 6 * query.nbytes + keys + 2 * turning.nbytes + 2 * grad_value.nbytes, both_passes


def _casts(narrow: Tensor) -> Iterator[Measured]:
    wide = narrow.float()
    yield "widen", 3 * narrow.nbytes, lambda: narrow.float()
    yield "narrow", 3 * narrow.nbytes, lambda: wide.bfloat16()
    yield "accumulate", 5 * narrow.nbytes, lambda: wide.add_(narrow)


def _embedding(config: ModelConfig, rows: Tensor) -> Iterator[Measured]:
    ids = torch.randint(config.vocab_size, (len(rows),), device="cuda")
    table = _drawn(config.vocab_size, config.hidden_size)
    yield "gather", 2 * rows.nbytes, lambda: table.index_select(0, ids)
    yield "scatter_add", 3 * rows.nbytes, lambda: table.index_add_(0, ids, rows)


def _loss(config: ModelConfig, training: Training) -> Measured:
    """A block of logits, as large as the trainer's: read, and overwritten with a gradient."""
    tokens = training.micro_batch * training.sequence_length
    blocks = max(1, math.ceil(tokens * config.vocab_size / DEVICES["h200"].logits_at_a_time))
    logits = _drawn(math.ceil(tokens / blocks), config.vocab_size)
    targets = torch.randint(config.vocab_size, (len(logits),), device="cuda")
    return "loss", 2 * logits.nbytes, lambda: cross_entropy.cross_entropy_(logits, targets, 1.0)


def _optimizer(training: Training) -> Measured:
    """AdamW over a quarter of a billion elements."""
    count, dtype = 1 << 28, torch.bfloat16 if training.bf16_moments else torch.float32
    gradient, parameter = _drawn(count), _drawn(count)
    master = parameter.float()
    moments = [torch.zeros(count, dtype=dtype, device="cuda") for _ in range(2)]
    rule = Rule(1e-4, 0.9, 0.95, 1e-8, 0.1, 1)
    clip, finite = torch.ones((), device="cuda"), torch.ones((), dtype=torch.bool, device="cuda")
    moved = gradient.nbytes + 2 * master.nbytes + 4 * moments[0].nbytes + parameter.nbytes
    return "optimizer", moved, lambda: adamw(master, gradient, *moments, parameter, rule, clip, finite)


def _permutation(config: ModelConfig, tokens: int) -> Permutation:
    """Every token to experts of its own, all equally loaded."""
    scores = torch.rand(tokens, config.n_routed_experts, device="cuda")
    return sort_by_expert(scores.topk(config.num_experts_per_tok).indices, config.n_routed_experts)


def _rows(config: ModelConfig, x: Tensor) -> Measured:
    places = _permutation(config, len(x)).places

    def there_and_back() -> None:
        permutation.sum_choices(permutation.take_rows(x, places), places)

    return "rows", 2 * (config.num_experts_per_tok + 1) * x.nbytes, there_and_back


def _gated(config: ModelConfig, tokens: int) -> Measured:
    gate, up, grad = (_drawn(tokens, config.intermediate_size) for _ in range(3))

    def both_passes() -> None:
        swiglu.swiglu(gate, up)
        swiglu.swiglu_backward(grad, gate, up)

    return "gated", 8 * gate.nbytes, both_passes


def _gated_rows(config: ModelConfig, tokens: int) -> Measured:
    rows, inner = tokens * config.num_experts_per_tok, config.moe_intermediate_size
    hidden, grad, weights = _drawn(rows, 2 * inner), _drawn(rows, inner), torch.rand(rows, device="cuda")

    def both_passes() -> None:
        swiglu.weighted_swiglu(hidden, weights)
        swiglu.weighted_swiglu_backward(grad, hidden, weights)

    return "gated", 9 * grad.nbytes, both_passes


def _quantisation(config: ModelConfig, x: Tensor) -> Iterator[Measured]:
    """What FP8 adds: rows quantised and cut anew, weights with their transpose, SwiGLU between two products."""
    tokens, width = x.shape
    yield "quantise", (2 + FP8_ELEMENT) * x.numel(), lambda: quantise.quantise_rows(x, power_of_two=True)
    rows, inner, ends = tokens, config.intermediate_size, torch.tensor([tokens], dtype=torch.int32, device="cuda")
    weights = None
    if config.n_routed_experts:
        ends = _permutation(config, tokens).ends
        rows, inner = tokens * config.num_experts_per_tok, config.moe_intermediate_size
        weights = torch.rand(rows, device="cuda")
    weight = _drawn(len(ends), 2 * inner, width)
    yield "quantise_weights", 4 * weight.numel(), lambda: quantise.quantise_weights_with_transpose(weight, True)
    hidden, grad = _drawn(rows, 2 * inner), _drawn(rows, inner)
    values, scales, kept, kept_scales = swiglu_fp8.swiglu_quantised(hidden, weights)

    def both_passes() -> None:
        swiglu_fp8.swiglu_quantised(hidden, weights)
        swiglu_fp8.swiglu_gradient_quantised(grad, kept, kept_scales, weights)

    # Where a scale reaches over gate and up, their gradients take a pass more (benthic/plan/float8_traffic.py).
    across = 0 if inner % 128 == 0 else 2 * (2 + 2 + FP8_ELEMENT) - 2 * FP8_ELEMENT
    yield "gated_fp8", (4 + 2 + 8 * FP8_ELEMENT + across) * grad.numel(), both_passes
    yield "retile", 2 * FP8_ELEMENT * values.numel(), lambda: retile.retile_columns(values, scales, ends)


def _matmul_rates(config: ModelConfig, training: Training) -> Rates:
    tokens, width = training.micro_batch * training.sequence_length, config.hidden_size
    inner = config.num_attention_heads * config.value_head_dim
    x, weight, grad = _drawn(tokens, width), _drawn(inner, width), _drawn(tokens, inner)
    flops = 2 * tokens * width * inner
    found = {
        ("matmul", "bf16"): flops / seconds_of(lambda: x @ weight.t()),
        ("weight_gradient", "bf16"): flops / seconds_of(lambda: grad.t() @ x),
    }
    if training.precision == "fp8":
        ends = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        found |= _fp8_rates("matmul", "weight_gradient", x, weight[None], grad, ends)
    return {key: Rate(value, SOURCE) for key, value in found.items()}


def _fp8_rates(product: Work, gradient: Work, x: Tensor, weight: Tensor, grad: Tensor, ends: Tensor) -> dict:
    """x [R, K] by groups times weight [E, N, K], and the weight gradient of both and grad [R, N]: FLOP/s."""
    rows, columns = (quantise.quantise_rows(one, power_of_two=True) for one in (x, grad))
    values, scales, *_ = quantise.quantise_weights_with_transpose(weight, True)
    left, right = (retile.retile_columns(*one, ends) for one in (columns, rows))
    flops = 2 * len(x) * weight.shape[1] * weight.shape[2]
    forward = seconds_of(lambda: grouped_matmul_fp8(*rows, values, scales, ends))
    backward = seconds_of(lambda: grouped_weight_gradient_fp8(*left, *right, ends, torch.bfloat16))
    return {(product, "fp8"): flops / forward, (gradient, "fp8"): flops / backward}


def _attention_rates(training: Training, config: ModelConfig) -> Rates:
    shape = (training.micro_batch, training.sequence_length)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    options = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    query = torch.randn(*shape, heads, config.query_head_dim, **options)
    key = torch.randn(*shape, key_heads, config.query_head_dim, **options)
    value = torch.randn(*shape, key_heads, config.value_head_dim, **options)
    out = ops.attention(query, key, value, config.softmax_scale)
    grad = torch.randn_like(out)
    with torch.no_grad():
        forward = seconds_of(lambda: ops.attention(query, key, value, config.softmax_scale))
    backward = seconds_of(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True))
    widths = config.query_head_dim + config.value_head_dim
    flops = shape[0] * shape[1] ** 2 * heads * widths
    return {
        ("attention", "bf16"): Rate(flops / forward, SOURCE),
        ("attention_backward", "bf16"): Rate(attention_backward_products(config) * flops / backward, SOURCE),
    }


def _grouped_rates(config: ModelConfig, training: Training) -> Rates:
    """Products of all experts, evenly loaded; of bfloat16 ones both ways, and of whole tiles."""
    tokens, chosen = training.micro_batch * training.sequence_length, config.num_experts_per_tok
    experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    rows = tokens * chosen
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
    ends[-1] = rows
    x, hidden, wide = _drawn(rows, width), _drawn(rows, inner), _drawn(rows, 2 * inner)
    gate_up, down = _drawn(experts, 2 * inner, width), _drawn(experts, width, inner)
    if training.precision == "fp8":
        found = _fp8_rates("grouped", "grouped_weight_gradient", x, gate_up, wide, ends)
        return {key: Rate(value, SOURCE) for key, value in found.items()}
    both = 0.0
    for left, weight in ((x, gate_up.transpose(1, 2)), (hidden, down.transpose(1, 2)), (x, down), (wide, gate_up)):
        both += seconds_of(partial(F.grouped_mm, left, weight, offs=ends))
    gradients = 0.0
    for left, right in ((wide, x), (x, hidden)):
        gradients += seconds_of(partial(F.grouped_mm, left.t(), right, offs=ends))
    flops = 2 * rows * width * 3 * inner
    tiles = 1 + GROUPED_TILE / 2 / (rows / experts)
    return {
        ("grouped", "bf16"): Rate(2 * flops * tiles / both, SOURCE),
        ("grouped_weight_gradient", "bf16"): Rate(flops / gradients, SOURCE),
    }

"""Rates of single kernels at a training setting's shapes, each measured alone and never within a step."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic import ops
from benthic.config.model import ModelConfig
from benthic.plan.devices import Device, MemoryWork, Rate
from benthic.plan.layer_time import attention_backward_products
from benthic.plan.training import LOGITS_AT_A_TIME, Training

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
    """`device` with rates measured now."""
    tokens, width = training.micro_batch * training.sequence_length, config.hidden_size
    rates = dict(device.measured) | _matmul_rates(tokens, width, config) | _attention_rates(training, config)
    if config.n_routed_experts:
        rates |= _grouped_rates(tokens, config)
    kinds = {}
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
    """A kernel of each kind, as the model's own code calls it."""
    tokens, width = training.micro_batch * training.sequence_length, config.hidden_size
    gate, up = _drawn(tokens, config.intermediate_size), _drawn(tokens, config.intermediate_size)
    yield "elementwise", 3 * gate.nbytes, lambda: gate * up
    yield _norm(_drawn(tokens, width))
    block = min(tokens, LOGITS_AT_A_TIME // config.vocab_size)
    logits = _drawn(block, config.vocab_size)
    yield "softmax", 3 * logits.nbytes, lambda: logits.softmax(-1, dtype=torch.float32)
    yield from _casts(_drawn(tokens * config.num_experts_per_tok if config.n_routed_experts else tokens, width))
    yield _optimizer()
    yield from _rows(config, tokens) if config.n_routed_experts else _without_experts(config, tokens)
    yield _join(config, training) if config.kv_lora_rank else _join_of_halves(config, training)


def _norm(x: Tensor) -> Measured:
    """Forward and backward, called below autograd, which would take longer than small ones do."""
    shape, gain, grad = list(x.shape[-1:]), torch.ones_like(x[0]), torch.randn_like(x)

    def both_passes() -> None:
        _, inverse = torch.ops.aten._fused_rms_norm(x, shape, gain, 1e-6)
        torch.ops.aten._fused_rms_norm_backward(grad, x, shape, inverse, gain, [True, True])

    return "norm", 7 * x.nbytes, both_passes


def _casts(narrow: Tensor) -> Iterator[Measured]:
    wide = narrow.float()
    yield "widen", 3 * narrow.nbytes, lambda: narrow.float()
    yield "narrow", 3 * narrow.nbytes, lambda: wide.bfloat16()
    yield "accumulate", 5 * narrow.nbytes, lambda: wide.add_(narrow)


def _optimizer() -> Measured:
    """AdamW over half a billion elements: 4 arrays read, 3 written."""
    weights = [torch.zeros(1 << 25, device="cuda", requires_grad=True) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    return "optimizer", 7 * sum(weight.nbytes for weight in weights), adamw.step


def _rows(config: ModelConfig, tokens: int) -> Iterator[Measured]:
    """Rows of routed experts, as ops/experts.py handles them."""
    width, inner, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    order = torch.randperm(tokens * chosen, device="cuda") // chosen
    x, rows = _drawn(tokens, width), _drawn(tokens * chosen, width)
    yield "gather", 2 * rows.nbytes, lambda: x.index_select(0, order)
    yield "scatter_add", 3 * rows.nbytes, lambda: x.index_add_(0, order, rows)
    wide, weights = rows.float().view(tokens, chosen, width), torch.rand(tokens, chosen, 1, device="cuda")
    yield "broadcast", 2 * wide.nbytes, lambda: wide * weights
    yield "reduction", wide.nbytes + wide.nbytes / chosen, lambda: wide.sum(1)
    gate, up = _drawn(tokens * chosen, 2 * inner).chunk(2, -1)
    yield "strided", 5 * 2 * gate.numel(), lambda: F.silu(gate) * up


def _without_experts(config: ModelConfig, tokens: int) -> Iterator[Measured]:
    """The same kinds where there are no experts: embedding, rotation of halves, and the loss."""
    width, classes = config.hidden_size, config.vocab_size
    ids = torch.randint(classes, (tokens,), device="cuda")
    table, rows = _drawn(classes, width), _drawn(tokens, width)
    yield "gather", 2 * rows.nbytes, lambda: table.index_select(0, ids)
    yield "scatter_add", 3 * rows.nbytes, lambda: table.index_add_(0, ids, rows)
    heads, half = config.num_attention_heads, config.query_head_dim // 2
    first, second = _drawn(tokens, heads, 2 * half, dtype=torch.float32).chunk(2, -1)
    yield "strided", 4 * first.numel() * 4, lambda: torch.complex(first, second)
    pairs, turns = torch.complex(first, second), torch.complex(first[:, :1], second[:, :1])
    yield "broadcast", 2 * pairs.nbytes, lambda: pairs * turns
    logits = _drawn(min(tokens, LOGITS_AT_A_TIME // classes), classes, dtype=torch.float32)
    yield "reduction", logits.nbytes, lambda: logits.amax(-1)


def _join(config: ModelConfig, training: Training) -> Measured:
    """A query from its two parts, as LatentAttention joins them."""
    shape = (training.micro_batch, training.sequence_length, config.num_attention_heads)
    whole, turned = _drawn(*shape, config.query_head_dim), _drawn(*shape, config.qk_rope_head_dim)
    part = whole[..., : config.qk_nope_head_dim]
    return "join", 2 * whole.nbytes, lambda: torch.cat((part, turned), -1)


def _join_of_halves(config: ModelConfig, training: Training) -> Measured:
    """Real and imaginary parts of what was rotated."""
    shape = (training.micro_batch, training.sequence_length, config.num_attention_heads, config.query_head_dim // 2)
    turned = torch.complex(_drawn(*shape, dtype=torch.float32), _drawn(*shape, dtype=torch.float32))
    return "join", 2 * turned.nbytes, lambda: torch.cat((turned.real, turned.imag), -1)


def _matmul_rates(tokens: int, width: int, config: ModelConfig) -> dict:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    inner = config.num_attention_heads * config.value_head_dim
    weight = torch.randn(inner, width, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(tokens, inner, dtype=torch.bfloat16, device="cuda")
    flops = 2 * tokens * width * inner
    found = {
        ("matmul", "bf16"): flops / seconds_of(lambda: x @ weight.t()),
        ("weight_gradient", "bf16"): flops / seconds_of(lambda: grad.t() @ x),
    }
    if config.n_routed_experts:
        router = torch.randn(config.n_routed_experts, width, device="cuda")
        floats = x.float()
        flops = 2 * tokens * width * config.n_routed_experts
        found["matmul", "fp32"] = flops / seconds_of(lambda: floats @ router.t())
        scores = floats @ router.t()
        found["weight_gradient", "fp32"] = flops / seconds_of(lambda: scores.t() @ floats)
    return {key: Rate(value, SOURCE) for key, value in found.items()}


def _attention_rates(training: Training, config: ModelConfig) -> dict:
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


def _grouped_rates(tokens: int, config: ModelConfig) -> dict:
    experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    rows = tokens * config.num_experts_per_tok
    offsets = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
    offsets[-1] = rows
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    x, hidden = torch.randn(rows, width, **options), torch.randn(rows, inner, **options)
    gate_up, down = torch.randn(experts, 2 * inner, width, **options), torch.randn(experts, width, inner, **options)
    wide = torch.randn(rows, 2 * inner, **options)
    flops = 2 * rows * width * 3 * inner
    forward = seconds_of(lambda: F.grouped_mm(x, gate_up.transpose(1, 2), offs=offsets))
    forward += seconds_of(lambda: F.grouped_mm(hidden, down.transpose(1, 2), offs=offsets))
    weight = seconds_of(lambda: F.grouped_mm(wide.t(), x, offs=offsets))
    weight += seconds_of(lambda: F.grouped_mm(x.t(), hidden, offs=offsets))
    return {
        ("grouped", "bf16"): Rate(flops / forward, SOURCE),
        ("grouped_weight_gradient", "bf16"): Rate(flops / weight, SOURCE),
    }

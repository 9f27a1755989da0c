"""Time of one layer's micro-batch on one rank, piece by piece.

A matrix product takes the longer of FLOPs / rate and bytes / bandwidth. Attention's backward does five products to the
forward's two. Memory-bound work takes its bytes over the bandwidth of its kind of kernel (traffic.py), or, where a
profile of the real system says what share of the time it takes, that share. No counted kernel takes less time than
launching it. Exchange is counted apart: schedules differ in what they hide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.activations import DROPPED_ROLES
from benthic.plan.communication import (
    BF16_ELEMENT,
    FP8_ELEMENT,
    context_parallel_bytes,
    exchange_rows,
    expert_exchange,
    forwarded_exchange,
    group_bandwidth,
    tensor_parallel_bytes,
)
from benthic.plan.devices import Device
from benthic.plan.holdings import layer_holding
from benthic.plan.kernels import Kernels, moving_seconds
from benthic.plan.operations import (
    Call,
    Operation,
    backward_operations,
    expected_experts,
    forward_operations,
    recomputed_operations,
)
from benthic.plan.traffic import (
    accumulation_traffic,
    embedding_traffic,
    embedding_weight_traffic,
    head_traffic,
    head_weight_traffic,
    layer_traffic,
)
from benthic.plan.training import Training

OVERLAP_STALL = 129.0 / 124.0 - 1
"""What an overlapped forward and backward pair takes beyond its computation: 129.0 ms with 124 ms of busy compute
stream in DeepSeek's published trace (profile-data, train.json)."""


GROUPED_TILE = 128
"""Rows of a grouped product's tile: an expert's last one is computed whole, half of it empty on average."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Seconds of a micro-batch on one rank, by part of the model and phase: "forward", "backward" (input gradients
    and recomputation), "weight" gradients, or "exchange" in "forward exchange", "backward exchange"."""

    part: str
    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a profile of the real system replaces. `memory_share` is the memory-bound share of compute time; None
    counts kernels and their bytes. `group_limit` is whether routing keeps a token to few nodes, `forwarding` whether
    DeepSeek's kernels exchange: through one device of each node, gradients of results in FP8."""

    memory_share: float | None = None
    overlap_stall: float = OVERLAP_STALL
    group_limit: bool = True
    forwarding: bool = False
    source: str = "bytes of each kernel over the bandwidth of its kind"


def layer_pieces(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int, overheads: Overheads
) -> list[Piece]:
    """One layer's micro-batch on one rank. A prediction layer's joining matrix is included."""
    call = _call(training, layout)
    forward = _layer_operations(config, training, layout, call, layer)
    again = recomputed_operations(forward, training.recomputation)
    host = _host(config, training, device, layout, overheads)
    arithmetic = [
        *_timed(forward, device, "forward", host),
        *_timed(again, device, "backward", host),
        *_timed(_as_computed(config, backward_operations(forward)), device, "backward", host),
    ]
    arithmetic = [replace(piece, seconds=piece.seconds / layout.tensor) for piece in arithmetic]
    if overheads.memory_share is None:
        moving = _counted_traffic(config, training, device, layout, layer)
    else:
        moving = _shared_traffic(arithmetic, overheads.memory_share)
    return [*arithmetic, *moving, *_exchange(config, training, device, layout, layer, overheads)]


def head_pieces(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, overheads: Overheads
) -> list[Piece]:
    """The heads' micro-batch: three products for the main loss and as many for each prediction layer's."""
    tokens = _call(training, layout).tokens
    heads = 1 + config.num_nextn_predict_layers
    flops = 2.0 * heads * tokens * config.vocab_size * config.hidden_size / layout.tensor
    precision = "fp32" if training.precision == "fp32" else "bf16"
    seconds = flops / device.rate("matmul", precision).value
    found = [Piece("head", "forward", seconds), Piece("head", "backward", seconds)]
    found.append(Piece("head", "weight", flops / device.rate("weight_gradient", precision).value))
    if overheads.memory_share is not None:
        return [*found, _fused_loss(heads * tokens * config.vocab_size / layout.tensor, device)]
    blocks = max(1, math.ceil(tokens * config.vocab_size / device.logits_at_a_time))
    kernels = heads * head_traffic(config, training.precision, blocks)
    shared = head_weight_traffic(training.precision, blocks, heads)
    size = config.vocab_size * config.hidden_size / layout.tensor
    for phase in ("forward", "backward"):
        found += _moving(kernels, phase, tokens / layout.tensor, device, training)
        found += _moving(shared, phase, size, device, training)
    return [*found, *_accumulation(size, device, training)]


def _fused_loss(logits: float, device: Device) -> Piece:
    """Beside a trace that does not show it: one kernel that passes over the logits four times in bfloat16."""
    return Piece("memory-bound", "forward", 4 * BF16_ELEMENT * logits / device.memory_bandwidth.value)


def embedding_pieces(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, overheads: Overheads
) -> list[Piece]:
    """The input embedding's micro-batch; nothing where a profile says what memory-bound work takes."""
    if overheads.memory_share is not None:
        return []
    tokens = _call(training, layout).tokens / layout.tensor
    size = config.vocab_size * config.hidden_size / layout.tensor
    kernels, whole = embedding_traffic(config, training.precision), embedding_weight_traffic(training.precision)
    found = [] if config.tie_word_embeddings else _accumulation(size, device, training)
    for phase in ("forward", "backward"):
        found += _moving(kernels, phase, tokens, device, training) + _moving(whole, phase, size, device, training)
    return found


def _accumulation(elements: float, device: Device, training: Training) -> list[Piece]:
    added = accumulation_traffic(training.precision, training.micro_batches)
    return [replace(one, phase="weight") for one in _moving(added, "backward", elements, device, training)]


def _moving(kernels: Iterable[Kernels], phase: str, items: float, device: Device, training: Training) -> list[Piece]:
    chosen = [one for one in kernels if one.phase == phase]
    times = moving_seconds(chosen, items, device, training.expert_imbalance)
    return [Piece(part, phase, seconds) for part, seconds in times.items()]


def _call(training: Training, layout: ParallelConfig) -> Call:
    length = training.sequence_length
    return Call(training.micro_batch, length // layout.context, length / 2)


def _layer_operations(
    config: ModelConfig, training: Training, layout: ParallelConfig, call: Call, layer: int
) -> list[Operation]:
    """Arithmetic of one layer on one rank: its matrices and the attention core."""
    expert = config.is_expert_layer(layer)
    predicts = layer >= config.num_hidden_layers
    one = config.replace(
        num_hidden_layers=1,
        first_k_dense_replace=0 if expert else 1,
        moe_layer_freq=1,
        num_nextn_predict_layers=int(predicts),
        tie_word_embeddings=False,
    )
    weights = "fp8" if training.precision == "fp8" else "bf16"
    found = forward_operations(one, call, weights=weights)
    if predicts:
        joined = forward_operations(one, call, weights=weights, include_mtp=True)
        found += [operation for operation in joined if operation.part == "prediction"]
    kept = [operation for operation in found if operation.work != "memory" and operation.part != "head"]
    return [_on_rank(operation, training, layout) for operation in kept]


def _on_rank(operation: Operation, training: Training, layout: ParallelConfig) -> Operation:
    if operation.part == "routed":
        rows = 1 + training.expert_imbalance
        weights = operation.weight_bytes / layout.expert
        moved = operation.activation_bytes * rows
        operation = replace(operation, flops=operation.flops * rows, weight_bytes=weights, activation_bytes=moved)
    return replace(operation, precision="fp32") if training.precision == "fp32" else operation


def attention_backward_products(config: ModelConfig) -> float:
    """FLOPs of attention's backward as computed, over those of its forward: five products of which three have the
    query's width, 2.6 for widths 192 and 128. Measured rates are counted so; model FLOPs count 2."""
    query, value = config.query_head_dim, config.value_head_dim
    return (3 * query + 2 * value) / (query + value)


def _as_computed(config: ModelConfig, backward: Iterable[Operation]) -> list[Operation]:
    factor = attention_backward_products(config) / 2
    return [replace(one, flops=one.flops * factor) if one.work == "attention_backward" else one for one in backward]


@dataclass(frozen=True, slots=True)
class _Host:
    """What is added to products: the time of a launch, and computed over useful rows of grouped ones."""

    launch_seconds: float = 0.0
    padding: float = 1.0


_LAUNCHES = {"attention_backward": 3, "attention": 2, "grouped": 2, "grouped_weight_gradient": 2}
"""Kernels of a product, where there are more than one: what prepares and what ends them."""


def _host(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, overheads: Overheads
) -> _Host:
    if overheads.memory_share is not None:
        return _Host()
    if not config.n_routed_experts or training.precision == "fp8":
        # The rates of FP8 products are those of useful rows.
        return _Host(device.launch_seconds.value)
    tokens = math.ceil(_call(training, layout).tokens / layout.tensor) * layout.expert
    rows = tokens * config.num_experts_per_tok / max(1.0, expected_experts(config, tokens))
    return _Host(device.launch_seconds.value, 1 + GROUPED_TILE / 2 / rows)


def _timed(operations: Iterable[Operation], device: Device, phase: str, host: _Host) -> list[Piece]:
    found = []
    for one in operations:
        if one.work == "memory":
            continue
        padding = host.padding if one.work == "grouped" else 1.0
        computing = padding * one.total_flops / device.rate(one.work, one.precision).value
        launching = one.count * _LAUNCHES.get(one.work, 1) * host.launch_seconds
        seconds = max(computing, one.total_bytes / device.memory_bandwidth.value, launching)
        is_weight = one.work in ("weight_gradient", "grouped_weight_gradient")
        part = "routed experts" if one.part == "routed" else "other matrices"
        if one.work in ("attention", "attention_backward"):
            part = "attention core"
        found.append(Piece(part, "weight" if is_weight else phase, seconds))
    return found


def _shared_traffic(arithmetic: Iterable[Piece], share: float) -> list[Piece]:
    return [Piece("memory-bound", one.phase, one.seconds * share / (1 - share)) for one in arithmetic]


def _counted_traffic(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int
) -> list[Piece]:
    tokens = _call(training, layout).tokens / layout.tensor
    dropped = DROPPED_ROLES[training.recomputation]
    kernels = layer_traffic(config, layer, training.precision)
    again = [
        replace(one, phase="backward")
        for one in kernels
        if one.phase == "forward" and (one.role in dropped or (one.block == "attention" and "attention" in dropped))
    ]
    elements = layer_holding(config, layout, layer).elements
    return [
        *_moving(kernels, "forward", tokens, device, training),
        *_moving([*kernels, *again], "backward", tokens, device, training),
        *_accumulation(elements, device, training),
    ]


def _exchange_seconds(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, overheads: Overheads
) -> tuple[float, float]:
    """Seconds a token of an expert layer's exchanges, forward and backward."""
    narrow, limit = training.precision == "fp8", overheads.group_limit
    if overheads.forwarding:
        width = config.hidden_size
        sizes = width * (FP8_ELEMENT if narrow else BF16_ELEMENT), width * BF16_ELEMENT
        seconds = sum(forwarded_exchange(config, layout, device, row, limit).seconds(device, 1) for row in sizes)
        return seconds, seconds
    rows = exchange_rows(config, narrow)
    each = [expert_exchange(config, layout, device, row, limit).seconds(device, 1) for row in rows.values()]
    return each[0] + each[1], each[2] + each[3]


def _exchange(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int, overheads: Overheads
) -> list[Piece]:
    tokens = _call(training, layout).tokens
    there = back = 0.0
    if config.is_expert_layer(layer) and layout.expert > 1:
        rows = tokens / layout.tensor * (1 + training.expert_imbalance)
        there, back = (rows * seconds for seconds in _exchange_seconds(config, training, device, layout, overheads))
    if layout.tensor > 1:
        summed = tensor_parallel_bytes(config, layout, tokens) / group_bandwidth(device, layout.tensor)
        there, back = there + summed, back + summed
    around = 0.0
    if layout.context > 1:
        ranks = layout.context * layout.tensor
        around = context_parallel_bytes(config, layout, tokens) / group_bandwidth(device, ranks)
    return [
        Piece("exchange", "forward exchange", there + around),
        Piece("exchange", "backward exchange", back + 2 * around),
    ]

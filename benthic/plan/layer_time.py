"""Time of one layer's micro-batch on one rank, piece by piece.

A matrix product takes the longer of FLOPs / rate and bytes / bandwidth. Attention's backward does five products to the
forward's two. Memory-bound work takes its bytes over the bandwidth, or, where a profile of the real system says what
share of the time it takes, that share. Exchange is counted apart: schedules differ in what they hide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.activations import DROPPED_ROLES
from benthic.plan.communication import (
    BF16_ELEMENT,
    FP8_ELEMENT,
    context_parallel_bytes,
    expert_exchange,
    group_bandwidth,
    tensor_parallel_bytes,
)
from benthic.plan.devices import Device
from benthic.plan.holdings import layer_holding
from benthic.plan.operations import (
    Call,
    Operation,
    backward_operations,
    forward_operations,
    recomputed_operations,
)
from benthic.plan.traffic import accumulation_bytes, layer_traffic, loss_traffic
from benthic.plan.training import Training

OVERLAP_STALL = 129.0 / 124.0 - 1
"""What an overlapped forward and backward pair takes beyond its computation: 129.0 ms with 124 ms of busy compute
stream in DeepSeek's published trace (profile-data, train.json)."""


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
    counts the plain path's bytes. `group_limit` is whether routing keeps a token to few nodes."""

    memory_share: float | None = None
    overlap_stall: float = OVERLAP_STALL
    group_limit: bool = True
    source: str = "bytes of the plain path over the device's bandwidth"


def layer_pieces(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int, overheads: Overheads
) -> list[Piece]:
    """One layer's micro-batch on one rank. A prediction layer's joining matrix is included."""
    call = _call(training, layout)
    forward = _layer_operations(config, training, layout, call, layer)
    again = recomputed_operations(forward, training.recomputation)
    arithmetic = [
        *_timed(forward, device, "forward"),
        *_timed(again, device, "backward"),
        *_timed(_as_computed(config, backward_operations(forward)), device, "backward"),
    ]
    arithmetic = [replace(piece, seconds=piece.seconds / layout.tensor) for piece in arithmetic]
    if overheads.memory_share is None:
        moving = [*_plain_traffic(config, training, device, layout, layer), *_casts(forward, device, layout)]
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
    moved = heads * tokens * loss_traffic(config, training.precision) / layout.tensor
    found.append(Piece("memory-bound", "forward", moved / device.memory_bandwidth.value))
    return found


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
    # The plain path multiplies by the router in float32.
    if training.precision == "fp32" or (operation.part == "router" and training.precision == "bf16"):
        return replace(operation, precision="fp32")
    return operation


def attention_backward_products(config: ModelConfig) -> float:
    """FLOPs of attention's backward as computed, over those of its forward: five products of which three have the
    query's width, 2.6 for widths 192 and 128. Measured rates are counted so; model FLOPs count 2."""
    query, value = config.query_head_dim, config.value_head_dim
    return (3 * query + 2 * value) / (query + value)


def _as_computed(config: ModelConfig, backward: Iterable[Operation]) -> list[Operation]:
    factor = attention_backward_products(config) / 2
    return [replace(one, flops=one.flops * factor) if one.work == "attention_backward" else one for one in backward]


def _timed(operations: Iterable[Operation], device: Device, phase: str) -> list[Piece]:
    found = []
    for one in operations:
        if one.work == "memory":
            continue
        computing = one.total_flops / device.rate(one.work, one.precision).value
        seconds = max(computing, one.total_bytes / device.memory_bandwidth.value)
        is_weight = one.work in ("weight_gradient", "grouped_weight_gradient")
        part = "routed experts" if one.part == "routed" else "other matrices"
        if one.work in ("attention", "attention_backward"):
            part = "attention core"
        found.append(Piece(part, "weight" if is_weight else phase, seconds))
    return found


def _shared_traffic(arithmetic: Iterable[Piece], share: float) -> list[Piece]:
    return [Piece("memory-bound", one.phase, one.seconds * share / (1 - share)) for one in arithmetic]


def _plain_traffic(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int
) -> list[Piece]:
    tokens = _call(training, layout).tokens / layout.tensor
    dropped = DROPPED_ROLES[training.recomputation]
    forward = backward = 0.0
    for one in layer_traffic(config, layer, training.precision):
        rows = 1 + training.expert_imbalance if one.name in ("rows to experts", "rows back") else 1.0
        repeated = one.role in dropped or (one.block == "attention" and "attention" in dropped)
        forward += one.forward * rows
        backward += (one.backward + one.forward * repeated) * rows
    bandwidth = device.memory_bandwidth.value
    found = [Piece("memory-bound", "forward", tokens * forward / bandwidth)]
    found.append(Piece("memory-bound", "backward", tokens * backward / bandwidth))
    elements = layer_holding(config, layout, layer).elements
    found.append(Piece("memory-bound", "weight", elements * accumulation_bytes(training.precision) / bandwidth))
    return found


def _casts(forward: Iterable[Operation], device: Device, layout: ParallelConfig) -> list[Piece]:
    """FP8 products: inputs are cast (3 B an element) and turned for the weight gradient (2 B); gradients of outputs
    are cast both ways (4 B). Inputs and outputs are taken to be equally wide."""
    elements = sum(one.count * one.activation_bytes / BF16_ELEMENT for one in forward if one.precision == "fp8")
    seconds = elements / 2 / layout.tensor / device.memory_bandwidth.value
    return [Piece("memory-bound", "forward", 3 * seconds), Piece("memory-bound", "backward", 6 * seconds)]


def _exchange(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, layer: int, overheads: Overheads
) -> list[Piece]:
    tokens = _call(training, layout).tokens
    seconds = 0.0
    if config.is_expert_layer(layer) and layout.expert > 1:
        sent = FP8_ELEMENT if training.precision == "fp8" else BF16_ELEMENT
        rows = tokens / layout.tensor * (1 + training.expert_imbalance)
        for element in (sent, BF16_ELEMENT):
            exchange = expert_exchange(config, layout, device, element, overheads.group_limit)
            seconds += exchange.seconds(device, rows)
    if layout.tensor > 1:
        seconds += tensor_parallel_bytes(config, layout, tokens) / group_bandwidth(device, layout.tensor)
    around = 0.0
    if layout.context > 1:
        ranks = layout.context * layout.tensor
        around = context_parallel_bytes(config, layout, tokens) / group_bandwidth(device, ranks)
    return [
        Piece("exchange", "forward exchange", seconds + around),
        Piece("exchange", "backward exchange", seconds + 2 * around),
    ]

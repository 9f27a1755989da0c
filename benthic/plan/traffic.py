"""Bytes one token moves through memory outside of matrix products and attention, operation by operation.

The trainer's plain path: each operation is a kernel that reads its inputs and writes its outputs (arrays of T rows;
what is small beside them is left out). Written as reads + writes, in elements of the computing dtype, `b` bytes, or
of float32, 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benthic.config.model import ModelConfig
from benthic.plan.activations import element_bytes
from benthic.plan.training import TrainingPrecision


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a token of one operation's forward and backward. `role` as in activations: what recomputation repeats."""

    block: str
    name: str
    forward: float
    backward: float
    role: str = "other"


def layer_traffic(config: ModelConfig, layer: int, precision: TrainingPrecision) -> list[Traffic]:
    """Everything memory-bound in one layer."""
    b, width = element_bytes(precision), config.hidden_size
    # Norm: x to y; backward reads gradient and x twice (input and gain), writes one.
    norm = Traffic("attention", "norm", 2 * b * width, 5 * b * width, "norm")
    residual = Traffic("attention", "residual sum", 3 * b * width, 3 * b * width)
    attention = _latent(config, b) if config.kv_lora_rank else _plain(config, b)
    feed_forward = (
        _experts(config, precision, b) if config.is_expert_layer(layer) else _gated(config.intermediate_size, b)
    )
    second = [Traffic("feed_forward", one.name, one.forward, one.backward, one.role) for one in (norm, residual)]
    return [norm, residual, *attention, *second, *feed_forward]


def loss_traffic(config: ModelConfig, precision: TrainingPrecision) -> float:
    """Bytes a token of one head's loss: logits written, softmax, both read for their largest; to float32 and back."""
    b = element_bytes(precision)
    if precision == "fp8":
        # As one fused kernel: logits written, read twice, the gradient written over them.
        return config.vocab_size * 4 * b
    casts = 0 if precision == "fp32" else 2 * (b + 4)
    return config.vocab_size * (b + (4 + 4) + (b + 4) + casts)


def update_bytes(precision: TrainingPrecision) -> float:
    """Bytes an element of the optimiser's step: clip (norm, scale), AdamW (4 read, 3 written), the compute copy."""
    publish = 0 if precision == "fp32" else 4 + 2
    return 4 + 8 + 7 * 4 + publish


def accumulation_bytes(precision: TrainingPrecision) -> float:
    """Bytes an element and micro-batch of adding the weight gradient to the float32 one."""
    return 3 * 4 if precision == "fp32" else 2 + 2 * 4


def _rotation(width: float, b: int) -> float:
    # To float32, complex product, back.
    return width * ((b + 4) + (4 + 4) + (4 + b))


def _latent(config: ModelConfig, b: int) -> Iterator[Traffic]:
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    latents = (config.q_lora_rank or 0) + latent
    yield Traffic("attention", "norms of latents", 2 * b * latents, 5 * b * latents, "norm")
    rotation = _rotation((heads + 1) * turned, b)
    yield Traffic("attention", "rotation", rotation, rotation, "expanded")
    query = heads * config.query_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    # What rotates is joined, and query and key from two parts each; backward joins the gradients of what was split,
    # and sums the shared rotary key over heads.
    joins = 2 * b * (heads + 1) * turned
    backward = joins + 2 * b * (query + expanded) + b * heads * turned
    yield Traffic("attention", "joins", joins + 2 * 2 * b * query, backward, "expanded")


def _plain(config: ModelConfig, b: int) -> Iterator[Traffic]:
    query = config.num_attention_heads * config.query_head_dim
    key = config.num_key_value_heads * config.query_head_dim
    if config.qk_norm:
        yield Traffic("attention", "norms of query and key", 2 * b * (query + key), 5 * b * (query + key), "norm")
    rotation = _rotation(query + key, b)
    yield Traffic("attention", "rotation", rotation, rotation, "attention")


def _gated(inner: float, b: int) -> Iterator[Traffic]:
    # silu: 1 read, 1 written; product: 2 read, 1 written. Backward: two products and silu's own.
    yield Traffic("feed_forward", "silu(gate) * up", 5 * b * inner, 9 * b * inner, "gated")


def _experts(config: ModelConfig, precision: TrainingPrecision, b: int) -> Iterator[Traffic]:
    width, chosen = config.hidden_size, config.num_experts_per_tok
    rows, inner = chosen * width, chosen * config.moe_intermediate_size
    # Tokens in float32 for the router, and back; its gradient joins the other.
    yield Traffic("feed_forward", "router", (b + 4) * width, (4 + b + 3 * b) * width)
    yield Traffic("feed_forward", "rows to experts", 2 * b * rows, 4 * b * rows)
    yield from _gated(inner, b)
    # Backward joins the gradients of gate and up.
    yield Traffic("feed_forward", "split gate and up", 0, 4 * b * inner)
    yield Traffic("feed_forward", "rows back", 2 * b * rows, 4 * b * rows)
    if precision == "fp8":
        # The experts' products were weighted before down_proj: rows are summed as they are.
        yield Traffic("feed_forward", "sum of rows", b * (rows + width), b * (rows + width))
    else:
        # In float32; backward: the rows' gradient, the product for the weights' gradient, and its sum.
        wide = (b + 4) * rows
        yield Traffic("feed_forward", "weighted sum", wide + 12 * rows + 8 * width, wide + 16 * rows)
    if config.n_shared_experts:
        yield from _gated(config.n_shared_experts * config.moe_intermediate_size, b)
        yield Traffic("feed_forward", "sum with shared expert", 3 * b * width, 3 * b * width)

"""What FP8 training in DeepSeek's framework moves beside its products: one kernel an operation, nothing twice.

A plan rather than a measurement (V3 report, 3.2.3 and 3.3): norms, SwiGLU and the exchange's copies read their inputs
and write their outputs once, at the bandwidth of a copy; launches hide behind the kernels. The replay of V3's own run
does not read this list: it takes the share of memory-bound time in the published trace.
"""

from __future__ import annotations

from collections.abc import Iterator

from benthic.config.model import ModelConfig
from benthic.plan.kernels import Kernels, both_ways

_BYTES = 2
"""Of an element between operations: bfloat16."""


def fused_layer(config: ModelConfig, layer: int) -> Iterator[Kernels]:
    """Everything memory-bound in one layer, bytes a token."""
    b, width = _BYTES, config.hidden_size
    for block in ("attention", "feed_forward"):
        # Norm: x to y; backward reads gradient and x twice (input and gain), writes one.
        yield from both_ways(block, "norm", 2 * b * width, 5 * b * width, "norm")
        yield from both_ways(block, "residual sum", 3 * b * width, 3 * b * width)
    yield from _latent(config) if config.kv_lora_rank else _plain(config)
    if config.is_expert_layer(layer):
        yield from _experts(config)
    else:
        yield from _gated(config.intermediate_size)


def fused_loss(config: ModelConfig) -> list[Kernels]:
    """As one kernel: logits written, read twice, the gradient written over them."""
    return [Kernels("head", "loss", "forward", "elementwise", config.vocab_size * 4 * _BYTES)]


def _rotation(width: float) -> float:
    # To float32, complex product, back.
    return width * ((_BYTES + 4) + (4 + 4) + (4 + _BYTES))


def _latent(config: ModelConfig) -> Iterator[Kernels]:
    b, heads, turned = _BYTES, config.num_attention_heads, config.qk_rope_head_dim
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank
    yield from both_ways("attention", "norms of latents", 2 * b * latents, 5 * b * latents, "norm")
    rotation = _rotation((heads + 1) * turned)
    yield from both_ways("attention", "rotation", rotation, rotation, "expanded")
    query = heads * config.query_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    # Query and key are joined from two parts each; backward joins the gradients of what was split, and sums the shared
    # rotary key's over heads.
    joins = 2 * b * (heads + 1) * turned
    backward = joins + 2 * b * (query + expanded) + b * heads * turned
    yield from both_ways("attention", "joins", joins + 2 * 2 * b * query, backward, "expanded")


def _plain(config: ModelConfig) -> Iterator[Kernels]:
    b = _BYTES
    query = config.num_attention_heads * config.query_head_dim
    key = config.num_key_value_heads * config.query_head_dim
    if config.qk_norm:
        norms = "norms of query and key"
        yield from both_ways("attention", norms, 2 * b * (query + key), 5 * b * (query + key), "norm")
    yield from both_ways("attention", "rotation", _rotation(query + key), _rotation(query + key), "attention")


def _gated(inner: float) -> Iterator[Kernels]:
    # silu: 1 read, 1 written; product: 2 read, 1 written. Backward: two products and silu's own.
    yield from both_ways("feed_forward", "silu(gate) * up", 5 * _BYTES * inner, 9 * _BYTES * inner, "gated")


def _experts(config: ModelConfig) -> Iterator[Kernels]:
    b, width, chosen = _BYTES, config.hidden_size, config.num_experts_per_tok
    rows, inner = chosen * width, chosen * config.moe_intermediate_size
    # Tokens in float32 for the router, and back; its gradient joins the other.
    yield from both_ways("feed_forward", "router", (b + 4) * width, (4 + b + 3 * b) * width)
    yield from both_ways("feed_forward", "rows to experts", 2 * b * rows, 4 * b * rows, routed=True)
    yield from _gated(inner)
    yield Kernels("feed_forward", "split gate and up", "backward", "elementwise", 4 * b * inner)
    yield from both_ways("feed_forward", "rows back", 2 * b * rows, 4 * b * rows, routed=True)
    # The experts' products were weighted before down_proj: rows are summed as they are.
    yield from both_ways("feed_forward", "sum of rows", b * (rows + width), b * (rows + width))
    if config.n_shared_experts:
        yield from _gated(config.n_shared_experts * config.moe_intermediate_size)
        yield from both_ways("feed_forward", "sum with shared expert", 3 * b * width, 3 * b * width)

"""What training in FP8 moves beside its products (model/float8.py), bytes a token: quantisation by rows, the same cut
anew down the tokens for weight gradients, and feed-forwards whose SwiGLU reads and writes FP8."""

from __future__ import annotations

from collections.abc import Iterator

from benthic.config.model import ModelConfig
from benthic.plan.communication import FP8_ELEMENT
from benthic.plan.kernels import Kernels, both_ways

_WIDE = 2
"""Of an element between operations: bfloat16."""
_QUANTISED = _WIDE + FP8_ELEMENT
_RETILED = 2 * FP8_ELEMENT


def latent_fp8(config: ModelConfig) -> Iterator[Kernels]:
    """Projections of latent attention; the first ones share their input's copy."""
    width, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank or 0
    query = heads * config.query_head_dim
    expanded = heads * ((config.qk_nope_head_dim or 0) + (config.v_head_dim or 0))
    yield _quantise("attention", width)
    first = (config.q_lora_rank or query, latent + config.qk_rope_head_dim)
    for out in first:
        yield from _gradients("attention", width, out)
    if config.q_lora_rank:
        yield _quantise("attention", config.q_lora_rank, "expanded")
        yield from _gradients("attention", config.q_lora_rank, query)
    yield _quantise("attention", latent, "expanded")
    yield from _gradients("attention", latent, expanded)
    yield from _output(config)


def plain_fp8(config: ModelConfig) -> Iterator[Kernels]:
    """Projections of keys and values of their own, each with its copy of the input."""
    width, head = config.hidden_size, config.query_head_dim
    for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads):
        yield _quantise("attention", width)
        yield from _gradients("attention", width, heads * head)
    yield from _output(config)


def dense_fp8(config: ModelConfig) -> Iterator[Kernels]:
    """A dense feed-forward."""
    yield _quantise("feed_forward", config.hidden_size)
    yield from _gated(config.hidden_size, config.intermediate_size)


def experts_fp8(config: ModelConfig) -> Iterator[Kernels]:
    """Routed experts, and the shared one whose result the sum over choices takes in."""
    width, inner, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    summed = _WIDE * (chosen + 1) * width
    shared = bool(config.n_shared_experts)
    yield _quantise("feed_forward", width)
    yield Kernels("feed_forward", "gradient quantised", "backward", "quantise", _QUANTISED * width)
    rows = _RETILED * chosen * width
    yield from both_ways("feed_forward", "rows to experts", "rows", rows, rows, routed=True)
    yield from both_ways("feed_forward", "rows summed", "rows", summed + shared * _WIDE * width, summed, routed=True)
    yield from _swiglu(inner, chosen)
    cut = _RETILED * chosen * (2 * width + 3 * inner)
    yield Kernels("feed_forward", "cut anew", "backward", "retile", cut, 4, routed=True)
    if shared:
        yield from _gated(width, config.n_shared_experts * inner)


def _gated(width: int, inner: int) -> Iterator[Kernels]:
    yield Kernels("feed_forward", "gradient quantised", "backward", "quantise", _QUANTISED * width)
    yield from _swiglu(inner, 1)
    yield Kernels("feed_forward", "cut anew", "backward", "retile", _RETILED * (2 * width + 3 * inner), 4)


def _swiglu(inner: int, rows: int) -> Iterator[Kernels]:
    """Forward: gate and up read in bfloat16; they and the activation written in FP8. Backward: the gradient and both
    read; their gradients and the activation written. Where a scale would reach over the border of gate and up, their
    gradients are quantised in a pass of their own."""
    routed, each = rows > 1, rows * inner
    across = inner % 128 != 0
    forward = (2 * _WIDE + 3 * FP8_ELEMENT) * each
    backward = (_WIDE + 3 * FP8_ELEMENT + 2 * (_WIDE if across else FP8_ELEMENT)) * each
    yield from both_ways("feed_forward", "SwiGLU in FP8", "gated_fp8", forward, backward, routed=routed)
    if across:
        yield Kernels(
            "feed_forward", "gradients quantised", "backward", "quantise", 2 * _QUANTISED * each, routed=routed
        )


def _output(config: ModelConfig) -> Iterator[Kernels]:
    """The projection after attention: its input is quantised in both passes, the second time down the tokens."""
    into, out = config.num_attention_heads * config.value_head_dim, config.hidden_size
    yield _quantise("attention", into)
    yield Kernels("attention", "quantised", "backward", "quantise", _QUANTISED * (into + out), 2)
    yield Kernels("attention", "cut anew", "backward", "retile", _RETILED * out)


def _quantise(block: str, width: int, role: str = "other") -> Kernels:
    return Kernels(block, "quantised", "forward", "quantise", _QUANTISED * width, role=role)


def _gradients(block: str, into: int, out: int) -> Iterator[Kernels]:
    yield Kernels(block, "gradient quantised", "backward", "quantise", _QUANTISED * out)
    yield Kernels(block, "cut anew", "backward", "retile", _RETILED * (into + out), 2)

"""What one token leaves in memory between forward and backward, tensor by tensor, on a GPU.

What the autograd functions of benthic.ops keep there; a test counts the storages that they keep of real models. The
list, for one layer, in the computing dtype where nothing else is said:

    norms              input, 1 / rms in float32; the output, as input of the matrices behind it
    latent attention   query latent and its norm's output, kv latent with rotary key and its norm's output
    attention core     query, key (rotary part repeated for each head), kv_b_proj's output (the value is a view of it),
                       output (also o_proj's input), logsumexp in float32
    plain attention    query, key (after rotation), value, output, logsumexp; with qk_norm the projections as well
    feed-forward       gate, up, their activation
    router             its input, scores in float32, chosen experts in int64
    routed experts     K times: gate and up, routing weight in float32, two numbers of the order in int64; their input
                       is the router's

Precision "fp8" is the recipe of model/float8.py: what a matrix reads is kept in e4m3 with a scale for each 128
channels, once for all matrices that read it; a feed-forward keeps gate and up so and nothing else; o_proj's input is
attention's output, kept as attention keeps it. Between matrices everything stays bfloat16, the router's input included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from benthic.config.model import ModelConfig
from benthic.plan.flops import Recomputation
from benthic.plan.training import TrainingPrecision

Role = Literal["input", "start", "norm", "expanded", "gated", "attention", "other"]
"""Why a tensor may be dropped: "input" of the layer (never; "start" if nothing but making the layer again needs it),
"norm" output in the computing dtype, "expanded" from latents, "gated" activation of SwiGLU, other parts of "attention",
or anything "other"."""

DROPPED_ROLES: dict[str, tuple[str, ...]] = {
    "none": ("start",),
    "up_projections": ("start", "norm", "expanded", "gated"),
    "attention": ("attention", "expanded"),
    "layer": ("norm", "expanded", "gated", "attention", "other"),
}


Block = Literal["attention", "feed_forward", "shared", "experts", "prediction"]
"""The part of a layer whose backward frees a tensor."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One kept tensor: bytes a token."""

    block: Block
    name: str
    bytes: float
    role: Role = "other"


def element_bytes(precision: TrainingPrecision) -> int:
    """Bytes of an activation that is not quantised."""
    return 4 if precision == "fp32" else 2


def fp8_row(width: int) -> int:
    """Bytes of `width` channels in e4m3, a float32 scale for each 128."""
    return width + 4 * math.ceil(width / 128)


def layer_activations(
    config: ModelConfig, layer: int, precision: TrainingPrecision, recomputation: Recomputation, rows: float = 1.0
) -> tuple[Saved, ...]:
    """What a layer keeps of one token. `rows` scales the routed rows where devices are not evenly loaded.

    Recomputation "up_projections" drops norm outputs, what is expanded from latents, and SwiGLU's activations
    (DeepSeek-V3 report, 3.2.3); "attention" the attention block; "layer" all but the layer's input.
    """
    kind = (config.is_expert_layer(layer), layer >= config.num_hidden_layers)
    return _layer_activations(config, kind, precision, recomputation, rows)


@lru_cache(maxsize=64)
def _layer_activations(
    config: ModelConfig,
    kind: tuple[bool, bool],
    precision: TrainingPrecision,
    recomputation: Recomputation,
    rows: float,
) -> tuple[Saved, ...]:
    experts, predicts = kind
    everything = [*_attention(config, precision, predicts), *_feed_forward(config, experts, precision, rows)]
    if predicts:
        everything += _prediction(config, precision)
    return tuple(one for one in everything if one.role not in DROPPED_ROLES[recomputation])


def _prediction(config: ModelConfig, precision: TrainingPrecision) -> Iterator[Saved]:
    """Besides its decoder layer: two norms, what they join to, a last norm. The norms' inputs lack positions, so that
    rows of several sequences are copies; under recomputation the state before is kept and no copy."""
    width, size = config.hidden_size, element_bytes(precision)
    yield Saved("prediction", "prediction: state before", width * size, "input")
    yield Saved("prediction", "prediction: embedding", width * size)
    yield Saved("prediction", "prediction: 1 / rms", 3 * 4)
    yield Saved("prediction", "prediction: joined norms", 2 * width * size)
    yield Saved("prediction", "prediction: state after", width * size)


def _attention(config: ModelConfig, precision: TrainingPrecision, predicts: bool) -> Iterator[Saved]:
    width, size = config.hidden_size, element_bytes(precision)
    heads, value = config.num_attention_heads, config.value_head_dim
    # In FP8 matrices do not keep the state itself, and without a norm before them nobody does.
    role: Role = "start" if precision == "fp8" and config.norm_placement == "after" else "input"
    # A prediction layer's own input is the state before; what its decoder layer reads can be computed again.
    yield Saved("attention", "layer input", width * size, "other" if predicts else role)
    # Projections of one input share its FP8 copy in latent attention alone.
    copies = 1 if config.kv_lora_rank else 3
    yield from _other_side(config, "attention", "attention norm", precision, copies, read_wide=False)
    yield from (_latent_inputs if config.kv_lora_rank else _plain_inputs)(config, precision)
    yield Saved("attention", "attention output", heads * value * size, "attention")
    yield Saved("attention", "attention logsumexp", heads * 4, "attention")


def _other_side(
    config: ModelConfig, block: Block, name: str, precision: TrainingPrecision, copies: int, read_wide: bool
) -> Iterator[Saved]:
    """A sublayer's norm keeps its input, and the matrices behind it their own: one is the state, this the other.

    Before the sublayer that is the norm's output, which recomputation may drop; after it, the sublayer's result. In
    FP8 matrices keep `copies` of their input instead of the input, which a router reads as it is (`read_wide`).
    """
    width, size = config.hidden_size, element_bytes(precision)
    yield Saved(block, name + ": 1 / rms", 4)
    if precision == "fp8":
        yield Saved(block, name + ": sublayer's input in FP8", copies * fp8_row(width))
    if config.norm_placement == "after":
        yield Saved(block, name + ": input", width * size)
    elif precision != "fp8" or read_wide:
        yield Saved(block, name + ": output", width * size, "norm")


def _latent_inputs(config: ModelConfig, precision: TrainingPrecision) -> Iterator[Saved]:
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank or 0, config.qk_rope_head_dim
    size = element_bytes(precision)
    if config.q_lora_rank:
        yield Saved("attention", "query latent", config.q_lora_rank * size, "attention")
        yield _normalised("query latent", config.q_lora_rank, precision)
        yield Saved("attention", "query latent: 1 / rms", 4)
    yield Saved("attention", "kv latent and rotary key", (latent + turned) * size, "attention")
    yield _normalised("kv latent", latent, precision)
    yield Saved("attention", "kv latent: 1 / rms", 4)
    # Made again from its projection, which then has to stay where it is expanded from no latent.
    query: Role = "expanded" if config.q_lora_rank else "attention"
    yield Saved("attention", "query", heads * config.query_head_dim * size, query)
    yield Saved("attention", "key", heads * config.query_head_dim * size, "expanded")
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield Saved("attention", "keys and values from the latent", expanded * size, "expanded")


def _normalised(name: str, width: int, precision: TrainingPrecision) -> Saved:
    if precision == "fp8":
        return Saved("attention", name + ", normalised, in FP8", fp8_row(width), "attention")
    return Saved("attention", name + ", normalised", width * element_bytes(precision), "norm")


def _plain_inputs(config: ModelConfig, precision: TrainingPrecision) -> Iterator[Saved]:
    heads, key_heads, head = config.num_attention_heads, config.num_key_value_heads, config.query_head_dim
    size = element_bytes(precision)
    if config.qk_norm:
        yield Saved("attention", "query and key before their norms", (heads + key_heads) * head * size, "attention")
        yield Saved("attention", "query and key norms: 1 / rms", 2 * 4)
    yield Saved("attention", "query", heads * head * size, "attention")
    yield Saved("attention", "key", key_heads * head * size, "attention")
    yield Saved("attention", "value", key_heads * head * size, "attention")


def _feed_forward(config: ModelConfig, experts: bool, precision: TrainingPrecision, rows: float) -> Iterator[Saved]:
    width, size = config.hidden_size, element_bytes(precision)
    # After it, the norm's input is another tensor, and in FP8 nobody but a router keeps the state.
    if config.norm_placement == "before" or precision != "fp8" or experts:
        yield Saved("feed_forward", "state after attention", width * size)
    yield from _other_side(config, "feed_forward", "feed-forward norm", precision, 1, read_wide=experts)
    if not experts:
        yield from _gated("feed_forward", "dense", config.intermediate_size, precision)
        return
    chosen = config.num_experts_per_tok * rows
    yield Saved("feed_forward", "router: scores", (config.n_routed_experts or 0) * 4)
    yield Saved("feed_forward", "router: choices", config.num_experts_per_tok * 8)
    yield Saved("experts", "routed: weights and order", chosen * (4 + 2 * 8))
    yield Saved("experts", "routed: gate and up", chosen * _gate_and_up(config.moe_intermediate_size, precision))
    if config.n_shared_experts:
        yield from _gated("shared", "shared", config.n_shared_experts * config.moe_intermediate_size, precision)


def _gate_and_up(inner: int, precision: TrainingPrecision) -> int:
    return 2 * fp8_row(inner) if precision == "fp8" else 2 * inner * element_bytes(precision)


def _gated(block: Block, name: str, inner: int, precision: TrainingPrecision) -> Iterator[Saved]:
    yield Saved(block, f"{name}: gate and up", _gate_and_up(inner, precision))
    if precision != "fp8":
        yield Saved(block, f"{name}: activation", inner * element_bytes(precision), "gated")

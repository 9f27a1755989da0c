"""What one token leaves in memory between forward and backward, tensor by tensor.

Precision "bf16" (or "fp32") is the trainer's plain path on a GPU, as autograd keeps it; a test counts the storages of
a real model. The list, for one layer, in the computing dtype where nothing else is said:

    norms              input, 1 / rms in float32; the output, as input of the matrices behind it
    latent attention   query latent and its norm's output, kv latent with rotary key and its norm's output
    attention core     query, key (rotary part repeated for each head), kv_b_proj's output (the value is a view of it),
                       output (also o_proj's input), logsumexp in float32
    plain attention    query, key (after rotation), value, output, logsumexp; with qk_norm the projections as well
    rotation           nothing where pairs are interleaved, the rotated part in float32 where halves are paired
    feed-forward       gate, silu(gate), up, their product
    router             input, scores, chosen weights in float32; expert numbers and orders in int64
    routed experts     K times: input row, gate and up, silu(gate), product; output row in float32

"fp8" is DeepSeek-V3's framework (report, 3.2.3 and 3.3.3), a plan rather than a measurement: inputs of matrices in
e4m3, o_proj's in E5M6, SwiGLU's inputs in e4m3, routing weights applied before down_proj so that no output row is
kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from benthic.config.model import ModelConfig
from benthic.plan.communication import FP8_ELEMENT
from benthic.plan.flops import Recomputation
from benthic.plan.training import TrainingPrecision

E5M6_ELEMENT = 12 / 8 + 4 / 128
"""Bytes of a 12-bit element with its share of a 4-byte scale for each 128."""

Role = Literal["input", "norm", "expanded", "gated", "attention", "other"]
"""Why a tensor may be dropped: "input" of the layer (never), "norm" output, "expanded" from latents, "gated" product
of SwiGLU, other parts of "attention", or anything "other"."""

DROPPED_ROLES: dict[str, tuple[str, ...]] = {
    "none": (),
    "up_projections": ("norm", "expanded", "gated"),
    "attention": ("attention", "expanded"),
    "layer": ("norm", "expanded", "gated", "attention", "other"),
}


Block = Literal["attention", "feed_forward", "shared", "expert outputs", "expert inputs", "prediction"]
"""The part of a layer whose backward frees a tensor; experts free their outputs before their inputs."""


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


def layer_activations(
    config: ModelConfig, layer: int, precision: TrainingPrecision, recomputation: Recomputation, rows: float = 1.0
) -> tuple[Saved, ...]:
    """What a layer keeps of one token. `rows` scales the routed rows where devices are not evenly loaded.

    Recomputation "up_projections" drops norm outputs, what is expanded from latents, and SwiGLU's products
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
    """Besides its decoder layer: two norms, the states they join, a last norm. The embedding is the first layer's."""
    width, size = config.hidden_size, element_bytes(precision)
    yield Saved("prediction", "prediction: state before", width * size, "input")
    yield Saved("prediction", "prediction: 1 / rms", 3 * 4, "norm")
    yield Saved("prediction", "prediction: joined norms", 2 * width * size, "norm")
    yield Saved("prediction", "prediction: state after", width * size)


def _attention(config: ModelConfig, precision: TrainingPrecision, predicts: bool) -> Iterator[Saved]:
    width, size = config.hidden_size, element_bytes(precision)
    matrix_input = FP8_ELEMENT if precision == "fp8" else size
    attention_output = E5M6_ELEMENT if precision == "fp8" else size
    heads, value = config.num_attention_heads, config.value_head_dim
    # A prediction layer's own input is the state before; what its decoder layer reads can be computed again.
    yield Saved("attention", "layer input", width * size, "other" if predicts else "input")
    yield _other_side(config, "attention", "attention norm", width, size, matrix_input)
    yield Saved("attention", "attention norm: 1 / rms", 4, "norm")
    yield from (_latent_inputs if config.kv_lora_rank else _plain_inputs)(config, precision, size, matrix_input)
    yield Saved("attention", "attention output", heads * value * attention_output, "attention")
    yield Saved("attention", "attention logsumexp", heads * 4, "attention")


def _other_side(config: ModelConfig, block: Block, name: str, width: int, size: float, matrix_input: float) -> Saved:
    """A sublayer's norm keeps its input, and the matrices behind it their own: one is the state, this the other.

    Before the sublayer that is the norm's output, which recomputation may drop; after it, the sublayer's result.
    """
    if config.norm_placement == "before":
        return Saved(block, name + ": output", width * matrix_input, "norm")
    return Saved(block, name + ": input", width * size)


def _latent_inputs(
    config: ModelConfig, precision: TrainingPrecision, size: int, matrix_input: float
) -> Iterator[Saved]:
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    if config.q_lora_rank:
        yield Saved("attention", "query latent", config.q_lora_rank * size, "attention")
        yield Saved("attention", "query latent, normalised", config.q_lora_rank * matrix_input, "norm")
        yield Saved("attention", "query latent: 1 / rms", 4, "norm")
    yield Saved("attention", "kv latent and rotary key", (latent + turned) * size, "attention")
    yield Saved("attention", "kv latent, normalised", latent * matrix_input, "norm")
    yield Saved("attention", "kv latent: 1 / rms", 4, "norm")
    yield Saved("attention", "query", heads * config.query_head_dim * size, "expanded")
    yield Saved("attention", "key", heads * config.query_head_dim * size, "expanded")
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield Saved("attention", "keys and values from the latent", expanded * size, "expanded")
    if not config.rope_interleave and precision != "fp8":
        yield Saved("attention", "halves to rotate in float32", (heads + 1) * turned * 4, "expanded")


def _plain_inputs(config: ModelConfig, precision: TrainingPrecision, size: int, matrix_input: float) -> Iterator[Saved]:
    heads, key_heads, head = config.num_attention_heads, config.num_key_value_heads, config.query_head_dim
    if config.qk_norm:
        yield Saved("attention", "query and key before their norms", (heads + key_heads) * head * size, "attention")
        yield Saved("attention", "query and key norms: 1 / rms", 2 * 4, "norm")
    yield Saved("attention", "query", heads * head * size, "attention")
    yield Saved("attention", "key", key_heads * head * size, "attention")
    yield Saved("attention", "value", key_heads * head * size, "attention")
    if not config.rope_interleave and precision != "fp8":
        yield Saved("attention", "halves to rotate in float32", (heads + key_heads) * head * 4, "attention")


def _feed_forward(config: ModelConfig, experts: bool, precision: TrainingPrecision, rows: float) -> Iterator[Saved]:
    width, size = config.hidden_size, element_bytes(precision)
    matrix_input = FP8_ELEMENT if precision == "fp8" else size
    # Routed rows are copies, and the router reads its own in float32: only a shared expert needs the input itself.
    reads_input = not experts or config.n_shared_experts or precision != "bf16"
    norm_first = config.norm_placement == "before"
    if norm_first or reads_input:
        yield Saved("feed_forward", "state after attention", width * size)
    if not norm_first or reads_input:
        yield _other_side(config, "feed_forward", "feed-forward norm", width, size, matrix_input)
    yield Saved("feed_forward", "feed-forward norm: 1 / rms", 4, "norm")
    if not experts:
        yield from _gated("feed_forward", "dense", config.intermediate_size, matrix_input)
        return
    yield from _router(config, precision)
    chosen = config.num_experts_per_tok * rows
    yield Saved("expert inputs", "routed: input rows", chosen * width * matrix_input)
    yield from _gated("expert inputs", "routed", chosen * config.moe_intermediate_size, matrix_input)
    if precision != "fp8":
        yield Saved("expert outputs", "routed: output rows in float32", chosen * width * 4)
    if config.n_shared_experts:
        yield from _gated("shared", "shared", config.n_shared_experts * config.moe_intermediate_size, matrix_input)


def _gated(block: Block, name: str, inner: float, size: float) -> Iterator[Saved]:
    products: Block = "expert outputs" if block == "expert inputs" else block
    yield Saved(block, f"{name}: gate and up", 2 * inner * size)
    yield Saved(products, f"{name}: silu(gate) and product", 2 * inner * size, "gated")


def _router(config: ModelConfig, precision: TrainingPrecision) -> Iterator[Saved]:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    # In float32 models the router reads the norm's output itself.
    if precision == "bf16":
        yield Saved("feed_forward", "router: input in float32", config.hidden_size * 4, "norm")
    yield Saved("feed_forward", "router: scores", experts * 4)
    # Dividing by their sum keeps the weights before it and the sum.
    normalised = chosen * 4 + 4 if config.norm_topk_prob else 0
    yield Saved("feed_forward", "router: weights", chosen * 4 + normalised)
    yield Saved("feed_forward", "router: choices and orders", 3 * chosen * 8)

"""Every parameter of a model, stated once, as plain rows.

`parameters(config)` gives what the model holds in memory: the published names, with the routed experts of a layer
stacked. `stored_tensors(config)` gives what a checkpoint folder holds: one tensor an expert, and prediction layers
with their own copies of embedding and head (DeepSeek-V3's README_WEIGHTS). Initialisation, sharding, optimiser,
checkpoint and planner read these rows; a test holds them against a meta-device model of every preset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from benthic.config.model import ModelConfig

Part = Literal["embedding", "head", "attention", "dense", "routed", "shared", "router", "norm", "prediction"]
Group = Literal["matrix", "embedding", "gain", "bias", "routing_bias"]
"""Optimiser groups. A routing_bias is moved by the balancing rule and never by a gradient."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor in memory.

    `shape` is [out, in] for matrices and [E, out, in] for stacked experts. `dtype` "model" follows the model,
    "float32" stays. `shard_axis` is the dimension that tensor or expert parallelism splits, None where every rank
    holds all. `fp8` says whether the published FP8 layout quantises it. `layer` is None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    group: Group = "matrix"
    initialisation: Literal["normal", "ones", "zeros"] = "normal"
    dtype: Literal["model", "float32"] = "model"
    shard_axis: int | None = None
    fp8: bool = False
    layer: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: `name`, `shape`, and the rows of which parameter it is.

    `source[expert]` rows `first_row` to `first_row + shape[0]` for an expert's tensor, all of `source` when `expert`
    is None. `duplicate` marks the prediction layers' second copies of embedding and head.
    """

    name: str
    shape: tuple[int, ...]
    source: Parameter
    expert: int | None = None
    first_row: int = 0
    duplicate: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Rows of the model in memory, prediction layers included, in module order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Parameter("model.embed_tokens.weight", vocabulary, "embedding", "embedding", shard_axis=0)
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        yield from _layer(config, layer)
    yield _gain("model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", vocabulary, "head", "embedding", shard_axis=0)


def _layer(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}."
    width = config.hidden_size
    is_prediction = layer >= config.num_hidden_layers
    if is_prediction:
        yield _gain(prefix + "enorm.weight", width, layer, "prediction")
        yield _gain(prefix + "hnorm.weight", width, layer, "prediction")
        yield Parameter(prefix + "eh_proj.weight", (width, 2 * width), "prediction", layer=layer)
    before = config.norm_placement == "before"
    if before:
        yield _gain(prefix + "input_layernorm.weight", width, layer)
    yield from _latent_attention(config, layer) if config.kv_lora_rank else _plain_attention(config, layer)
    yield _gain(prefix + "post_attention_layernorm.weight", width, layer)
    if config.is_expert_layer(layer):
        yield from _experts(config, layer)
    else:
        yield from _swiglu(prefix + "mlp.", width, config.intermediate_size, "dense", layer)
    if not before:
        yield _gain(prefix + "post_feedforward_layernorm.weight", width, layer)
    if is_prediction:
        yield _gain(prefix + "shared_head.norm.weight", width, layer, "prediction")


def _gain(name: str, width: int, layer: int | None = None, part: Part = "norm") -> Parameter:
    return Parameter(name, (width,), part, "gain", "ones", layer=layer)


def _linear(
    name: str, out: int, into: int, part: Part, layer: int, shard: int | None = None, bias: bool = False
) -> Iterator[Parameter]:
    yield Parameter(name + ".weight", (out, into), part, shard_axis=shard, fp8=True, layer=layer)
    if bias:
        bias_shard = 0 if shard == 0 else None
        yield Parameter(name + ".bias", (out,), part, "bias", "zeros", shard_axis=bias_shard, layer=layer)


def _latent_attention(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}.self_attn."
    width, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query_rows = heads * config.query_head_dim
    if config.q_lora_rank is None:
        yield from _linear(prefix + "q_proj", query_rows, width, "attention", layer, 0)
    else:
        rank = config.q_lora_rank
        yield from _linear(prefix + "q_a_proj", rank, width, "attention", layer, bias=config.qkv_bias)
        yield _gain(prefix + "q_a_layernorm.weight", rank, layer)
        yield from _linear(prefix + "q_b_proj", query_rows, rank, "attention", layer, 0)
    latent_rows = latent + config.qk_rope_head_dim
    yield from _linear(prefix + "kv_a_proj_with_mqa", latent_rows, width, "attention", layer, bias=config.qkv_bias)
    yield _gain(prefix + "kv_a_layernorm.weight", latent, layer)
    expanded_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield from _linear(prefix + "kv_b_proj", expanded_rows, latent, "attention", layer, 0)
    value_rows = heads * config.v_head_dim
    yield from _linear(prefix + "o_proj", width, value_rows, "attention", layer, 1, config.output_bias)


def _plain_attention(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}.self_attn."
    width, head = config.hidden_size, config.query_head_dim
    query_rows, key_rows = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, rows in (("q_proj", query_rows), ("k_proj", key_rows), ("v_proj", key_rows)):
        yield from _linear(prefix + name, rows, width, "attention", layer, 0, config.qkv_bias)
    if config.qk_norm:
        yield _gain(prefix + "q_norm.weight", query_rows, layer)
        yield _gain(prefix + "k_norm.weight", key_rows, layer)
    yield from _linear(prefix + "o_proj", width, query_rows, "attention", layer, 1, config.output_bias)


def _swiglu(prefix: str, width: int, inner: int, part: Part, layer: int) -> Iterator[Parameter]:
    yield from _linear(prefix + "gate_proj", inner, width, part, layer, 0)
    yield from _linear(prefix + "up_proj", inner, width, part, layer, 0)
    yield from _linear(prefix + "down_proj", width, inner, part, layer, 1)


def _experts(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}.mlp."
    experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    yield Parameter(prefix + "gate.weight", (experts, width), "router", layer=layer)
    if config.has_routing_bias:
        yield Parameter(
            prefix + "gate.e_score_correction_bias",
            (experts,),
            "router",
            "routing_bias",
            "zeros",
            dtype="float32",
            layer=layer,
        )
    for name, shape in (("gate_up_proj", (experts, 2 * inner, width)), ("down_proj", (experts, width, inner))):
        yield Parameter(prefix + "experts." + name, shape, "routed", shard_axis=0, fp8=True, layer=layer)
    if config.n_shared_experts:
        yield from _swiglu(prefix + "shared_experts.", width, inner * config.n_shared_experts, "shared", layer)


def stored_tensors(config: ModelConfig) -> Iterator[StoredTensor]:
    """Rows of a published checkpoint folder, weights only (FP8 scales are named after them), in module order."""
    shared = {}
    for row in parameters(config):
        if row.part in ("embedding", "head"):
            shared[row.part] = row
        if row.part == "routed":
            yield from _unstacked(row)
        else:
            yield StoredTensor(row.name, row.shape, row)
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        embedding = shared["embedding"]
        head = shared.get("head", embedding)
        yield StoredTensor(prefix + "embed_tokens.weight", embedding.shape, embedding, duplicate=True)
        yield StoredTensor(prefix + "shared_head.head.weight", head.shape, head, duplicate=True)


def _unstacked(row: Parameter) -> Iterator[StoredTensor]:
    experts, rows, columns = row.shape
    prefix, _, kind = row.name.rpartition(".")
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    height = rows // len(names)
    for expert in range(experts):
        for index, name in enumerate(names):
            stored = f"{prefix}.{expert}.{name}.weight"
            yield StoredTensor(stored, (height, columns), row, expert, index * height)

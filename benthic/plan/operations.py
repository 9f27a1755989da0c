"""One call of the model as a list of operations, each with its FLOPs and the bytes it moves.

Parameters come from the manifest: a token costs 2 FLOPs for each one it meets, which are its active parameters without
the input embedding (6 N in training, as published). The attention core, the only work without parameters that counts,
costs 2 (d_qk + d_v) FLOPs for each head and attended position.

Conventions. "causal": a token of a sequence of S attends to S / 2 positions (DeepSeek, NVIDIA); "full": to all S
(torchtitan, torch's counter). Training is three forwards, one for each of output, input gradient and weight gradient;
recomputation is counted apart, because model FLOPs leave it out. Activations and the softmax move bytes and count no
FLOPs. Looking up an embedding is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import Precision, Work
from benthic.plan.kv_cache import CacheFormat, cache_bytes_per_layer
from benthic.plan.parameters import RepeatedParameter, WeightFormat, active_size, repeated_parameters, row_bytes

Convention = Literal["causal", "full"]
Recomputation = Literal["none", "up_projections", "attention", "layer"]
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "up_projections", "attention", "layer")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a call. FLOPs and bytes are those of one execution; `count` executions happen (layers).

    `work` chooses the device's rate; "memory" marks what takes the time of its bytes alone. `weight_bytes` are read
    once a call, `activation_bytes` are inputs and outputs (for attention over a cache: the cache).
    """

    name: str
    part: str
    work: Work | Literal["memory"]
    precision: Precision
    count: int
    flops: float
    weight_bytes: float
    activation_bytes: float

    @property
    def total_flops(self) -> float:
        """FLOPs of all executions."""
        return self.count * self.flops

    @property
    def total_bytes(self) -> float:
        """Bytes of all executions."""
        return self.count * (self.weight_bytes + self.activation_bytes)

    @property
    def intensity(self) -> float:
        """FLOPs a byte; a device computes at its peak above its own ratio of the two."""
        moved = self.weight_bytes + self.activation_bytes
        return self.flops / moved if moved else 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of the model processes: `sequences` times `new_tokens`, each attending to `attended` positions.

    `cached` positions a sequence are read from the cache (absorbed attention for MLA); None means that keys and
    values of the call itself are used, expanded.
    """

    sequences: int
    new_tokens: int
    attended: float
    cached: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the call."""
        return self.sequences * self.new_tokens


def whole_sequences(sequences: int, length: int, convention: Convention = "causal") -> Call:
    """A forward over whole sequences: training, or prefill without a cached prefix."""
    require_positive("sequences", sequences)
    require_positive("sequence length", length)
    if convention not in ("causal", "full"):
        raise ConfigError(f"convention is {convention!r}; allowed: causal, full")
    return Call(sequences, length, length / 2 if convention == "causal" else length)


def decode_step(sequences: int, context: int, new_tokens: int = 1) -> Call:
    """A decode step at `context` positions a sequence, the new ones included."""
    require_positive("batch", sequences)
    require_positive("context", context)
    require_positive("new tokens", new_tokens)
    return Call(sequences, new_tokens, context, cached=context)


def forward_operations(
    config: ModelConfig,
    call: Call,
    weights: WeightFormat = "bf16",
    cache: CacheFormat = "bf16",
    include_mtp: bool = False,
) -> list[Operation]:
    """Every operation of one forward call. Prediction layers run on all tokens of the call when included."""
    found: dict[tuple, Operation] = {}
    for parameter in repeated_parameters(config):
        if parameter.is_prediction and not include_mtp:
            continue
        for one in _of_parameter(config, call, parameter, weights):
            key = (one.name, one.flops, one.activation_bytes)
            seen = found.get(key)
            found[key] = replace(seen, count=seen.count + one.count) if seen else one
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if include_mtp else 0)
    return [
        *found.values(),
        *_attention_core(config, call, weights, cache, layers),
        *_feed_forward_traffic(config, call, weights, layers),
        *_heads(config, call, weights, include_mtp),
    ]


def element_bytes(weights: WeightFormat) -> int:
    """Bytes of an element that travels between operations: float32 with float32 weights, else bf16."""
    return 4 if weights == "fp32" else 2


def wide_precision(weights: WeightFormat) -> Precision:
    """The precision of all that is not quantised."""
    return "fp32" if weights == "fp32" else "bf16"


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """Distinct experts that `tokens` tokens meet in a layer, each choosing K of E uniformly and independently."""
    experts = config.n_routed_experts or 0
    if not experts:
        return 0.0
    return experts * (1.0 - (1.0 - config.num_experts_per_tok / experts) ** tokens)


def backward_operations(forward: Iterable[Operation]) -> list[Operation]:
    """The backward of a forward: input gradient and weight gradient of each matrix, twice the core, twice the bytes."""
    backward = []
    for one in forward:
        if one.work == "memory":
            backward.append(replace(one, name=one.name + " backward", activation_bytes=2 * one.activation_bytes))
        elif one.work == "attention":
            backward.append(
                replace(
                    one,
                    name=one.name + " backward",
                    work="attention_backward",
                    flops=2 * one.flops,
                    activation_bytes=2 * one.activation_bytes,
                )
            )
        else:
            kind: Work = "grouped_weight_gradient" if one.work == "grouped" else "weight_gradient"
            backward.append(replace(one, name=one.name + " input gradient"))
            backward.append(replace(one, name=one.name + " weight gradient", work=kind))
    return backward


def recomputed_operations(forward: Iterable[Operation], recomputation: Recomputation) -> list[Operation]:
    """What is computed a second time during the backward.

    none; up_projections: norms and the latents' up-projections (DeepSeek-V3 report, 3.2.3), for other attention the
    norms alone; attention: the whole attention block; layer: every layer, the head left out.
    """
    if recomputation not in _RECOMPUTED:
        raise ConfigError(f"recomputation is {recomputation!r}; allowed: {', '.join(_RECOMPUTED)}")
    return [replace(one, name=one.name + " again") for one in forward if _RECOMPUTED[recomputation](one)]


_RECOMPUTED = {
    "none": lambda one: False,
    "up_projections": lambda one: one.part == "norm" or one.name in ("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    "attention": lambda one: one.part in ("norm", "attention"),
    "layer": lambda one: one.part != "head",
}


def total_flops(operations: Sequence[Operation]) -> float:
    """FLOPs of a list of operations."""
    return sum(one.total_flops for one in operations)


def _of_parameter(
    config: ModelConfig, call: Call, parameter: RepeatedParameter, weights: WeightFormat
) -> Iterable[Operation]:
    """The operation of a manifest row: a matrix product, or a norm or bias, whose time is that of its bytes."""
    row, name = parameter.row, parameter.name.removesuffix(".weight").removeprefix("model.")
    wide: Precision = wide_precision(weights)
    vector_flops = 2.0 * call.tokens * row.size
    if row.group == "gain":
        # A layer's norm is fused with the residual sum: read both, write both. Norms of latents read and write one.
        passes = 2 if parameter.part == "attention" else 4
        moved = passes * call.tokens * row.size * element_bytes(weights)
        size = float(row_bytes(config, row, weights))
        yield Operation(name, "norm", "memory", wide, parameter.count, vector_flops, size, moved)
    elif len(row.shape) == 1:
        size = float(row_bytes(config, row, weights))
        yield Operation(name, parameter.part, "memory", wide, parameter.count, vector_flops, size, 0.0)
    elif row.part != "embedding":
        is_routed = row.part == "routed"
        used = expected_experts(config, call.tokens) / config.n_routed_experts if is_routed else 1.0
        inputs = call.tokens * (config.num_experts_per_tok if is_routed else 1)
        yield Operation(
            name=name,
            part=parameter.part,
            work="grouped" if is_routed else "matmul",
            precision="fp8" if weights == "fp8" and row.fp8 else wide,
            count=parameter.count,
            flops=2.0 * call.tokens * active_size(config, row),
            weight_bytes=used * row_bytes(config, row, weights),
            activation_bytes=inputs * (row.shape[-1] + row.shape[-2]) * element_bytes(weights),
        )


def _attention_core(
    config: ModelConfig, call: Call, weights: WeightFormat, cache: CacheFormat, layers: int
) -> Iterable[Operation]:
    heads, key, value = config.num_attention_heads, config.query_head_dim, config.value_head_dim
    absorbed = call.cached is not None and config.kv_lora_rank is not None
    if absorbed:
        key, value = config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    moved = call.tokens * heads * (key + value) * element_bytes(weights)
    if call.cached is None:
        moved += call.tokens * config.num_key_value_heads * (key + value) * element_bytes(weights)
    else:
        moved += call.sequences * call.cached * cache_bytes_per_layer(config, cache)
    yield Operation(
        name="attention core",
        part="attention",
        work="attention" if call.cached is None else "decode",
        precision=wide_precision(weights),
        count=layers,
        flops=2.0 * call.tokens * call.attended * heads * (key + value),
        weight_bytes=0.0,
        activation_bytes=moved,
    )
    turned = heads * config.rotary_dim + (
        config.rotary_dim if config.kv_lora_rank else config.num_key_value_heads * config.rotary_dim
    )
    yield _traffic("rotary", "attention", weights, layers, 2 * call.tokens * turned)


def _feed_forward_traffic(config: ModelConfig, call: Call, weights: WeightFormat, layers: int) -> Iterable[Operation]:
    """SwiGLU (read two, write one), and copying tokens to their experts and back."""
    expert_layers = sum(config.is_expert_layer(layer) for layer in range(layers))
    if layers > expert_layers:
        moved = 3 * call.tokens * config.intermediate_size
        yield _traffic("dense activation", "dense", weights, layers - expert_layers, moved)
    if not expert_layers:
        return
    chosen, width = config.num_experts_per_tok, config.moe_intermediate_size
    yield _traffic("expert activation", "routed", weights, expert_layers, 3 * call.tokens * chosen * width)
    yield _traffic(
        "dispatch and combine", "routed", weights, expert_layers, 2 * call.tokens * (1 + chosen) * config.hidden_size
    )
    if config.n_shared_experts:
        moved = 3 * call.tokens * config.n_shared_experts * width
        yield _traffic("shared activation", "shared", weights, expert_layers, moved)


def _traffic(name: str, part: str, weights: WeightFormat, count: int, elements: float) -> Operation:
    return Operation(name, part, "memory", wide_precision(weights), count, 0.0, 0.0, elements * element_bytes(weights))


def _heads(config: ModelConfig, call: Call, weights: WeightFormat, include_mtp: bool) -> Iterable[Operation]:
    """Heads beyond the manifest's own row: a tied head, and the shared head once more for each prediction layer."""
    count = int(config.tie_word_embeddings) + (config.num_nextn_predict_layers if include_mtp else 0)
    if count:
        yield Operation(
            name="shared head",
            part="head",
            work="matmul",
            precision=wide_precision(weights),
            count=count,
            flops=2.0 * call.tokens * config.vocab_size * config.hidden_size,
            weight_bytes=float(config.vocab_size * config.hidden_size * element_bytes(weights)),
            activation_bytes=call.tokens * (config.vocab_size + config.hidden_size) * element_bytes(weights),
        )


def require_positive(name: str, value: float) -> None:
    """Raise ConfigError for a size that is zero or negative."""
    if value <= 0:
        raise ConfigError(f"{name} is {value}; it must be at least 1")

"""Serving a model: weights and cache on each GPU, what fits, time to a first and to each next token.

Routed experts are spread over all GPUs (expert parallelism). Attention, dense and shared layers are either split by
heads and columns ("tensor": every GPU sees every sequence, and holds the whole latent cache) or replicated ("data":
every GPU has its own sequences and their cache). Times are floors: the roofline of each operation on the busiest GPU
with evenly loaded experts, plus communication that nothing hides; kernel launches are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import Device
from benthic.plan.kv_cache import CacheFormat, bytes_per_token_of_rank, cache_bytes_per_token
from benthic.plan.operations import Call, Operation, decode_step, forward_operations, require_positive, whole_sequences
from benthic.plan.parameters import WeightFormat, repeated_parameters, row_bytes
from benthic.plan.roofline import roofline, total_seconds

AttentionLayout = Literal["tensor", "data"]
RESERVED_MEMORY = 0.10
"""Share of memory left to activations, graphs and fragmentation."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served: GPUs of one kind, formats, and how attention is spread. Checked by `check`."""

    device: Device
    gpus: int = 1
    attention: AttentionLayout = "tensor"
    weights: WeightFormat = "bf16"
    cache: CacheFormat = "bf16"
    include_mtp: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one engine step on the busiest GPU, and the tokens all GPUs produce in it."""

    compute_seconds: float
    communication_seconds: float
    tokens: float

    @property
    def seconds(self) -> float:
        """Whole step."""
        return self.compute_seconds + self.communication_seconds

    @property
    def tokens_per_second(self) -> float:
        """All GPUs together."""
        return self.tokens / self.seconds


def check(config: ModelConfig, serving: Serving) -> None:
    """Raise ConfigError when a layout does not divide the model."""
    gpus = serving.gpus
    require_positive("gpus", gpus)
    if serving.attention not in ("tensor", "data"):
        raise ConfigError(f"attention is {serving.attention!r}; allowed: tensor, data")
    if config.n_routed_experts and config.n_routed_experts % gpus:
        raise ConfigError(
            f"gpus is {gpus}; it must divide n_routed_experts ({config.n_routed_experts})", hint=_divisors(config)
        )
    if serving.attention == "tensor":
        rank_config(config, gpus)


def _divisors(config: ModelConfig) -> str:
    experts = config.n_routed_experts
    return "allowed: " + ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)


def rank_config(config: ModelConfig, tensor_parallel: int) -> ModelConfig:
    """The smaller model that one rank of tensor parallelism computes, experts and vocabulary aside."""
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % tensor_parallel:
            raise ConfigError(
                f"gpus is {tensor_parallel}; tensor-parallel attention needs it to divide {name} "
                f"({getattr(config, name)})",
                hint="use fewer gpus, or attention 'data'",
            )
    heads = config.num_attention_heads // tensor_parallel
    changes = {"num_attention_heads": heads, "intermediate_size": config.intermediate_size // tensor_parallel}
    if config.kv_lora_rank:
        changes["num_key_value_heads"] = heads
    else:
        changes["num_key_value_heads"] = -(-config.num_key_value_heads // tensor_parallel)
        changes["head_dim"] = config.query_head_dim
    return config.replace(**changes)


def weight_bytes_per_gpu(config: ModelConfig, serving: Serving) -> int:
    """Bytes of weights on each GPU."""
    check(config, serving)
    total = 0.0
    for one in repeated_parameters(config):
        if one.is_prediction and not serving.include_mtp:
            continue
        tensor_split = serving.attention == "tensor" and one.row.shard_axis is not None
        ways: float = serving.gpus if one.part == "routed" or tensor_split else 1
        if tensor_split and not config.kv_lora_rank and one.name.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            # A head is never cut: with more GPUs than key-value heads, several hold the same one.
            ways = config.num_key_value_heads / -(-config.num_key_value_heads // serving.gpus)
        total += one.count * row_bytes(config, one.row, serving.weights) / ways
    return round(total)


def free_bytes_per_gpu(config: ModelConfig, serving: Serving) -> int:
    """Bytes left for the cache on each GPU; negative when the weights do not fit."""
    usable = serving.device.memory_bytes * (1.0 - RESERVED_MEMORY)
    return int(usable) - weight_bytes_per_gpu(config, serving)


def cache_bytes_per_token_per_gpu(config: ModelConfig, serving: Serving) -> float:
    """Bytes that one token of a sequence takes on each GPU that holds the sequence."""
    if serving.attention == "data":
        return cache_bytes_per_token(config, serving.cache, include_mtp=serving.include_mtp)
    return bytes_per_token_of_rank(config, serving.gpus, serving.cache, include_mtp=serving.include_mtp)


def sequences_per_gpu(serving: Serving, batch: int) -> int:
    """Sequences whose cache the busiest GPU holds."""
    return -(-batch // serving.gpus) if serving.attention == "data" else batch


def longest_context(config: ModelConfig, serving: Serving, batch: int = 1) -> int:
    """Positions each of `batch` sequences can have in memory; 0 when not even the weights fit."""
    require_positive("batch", batch)
    one = cache_bytes_per_token_per_gpu(config, serving) * sequences_per_gpu(serving, batch)
    return max(0, int(free_bytes_per_gpu(config, serving) // one))


def largest_batch(config: ModelConfig, serving: Serving, context: int) -> int:
    """Sequences of `context` positions that fit all GPUs together; 0 when not even the weights fit."""
    require_positive("context", context)
    held = free_bytes_per_gpu(config, serving) // (cache_bytes_per_token_per_gpu(config, serving) * context)
    return max(0, int(held)) * (serving.gpus if serving.attention == "data" else 1)


def fewest_gpus(config: ModelConfig, serving: Serving, batch: int, context: int) -> int | None:
    """The smallest power of two of GPUs that holds weights and cache, None when 1,024 do not."""
    for gpus in (2**power for power in range(11)):
        try:
            if longest_context(config, replace(serving, gpus=gpus), batch) >= context:
                return gpus
        except ConfigError:
            continue
    return None


def decode(config: ModelConfig, serving: Serving, batch: int, context: int, new_tokens: int = 1) -> Step:
    """One step that gives each of `batch` sequences at `context` positions its next token."""
    check(config, serving)
    return _step(config, serving, decode_step(batch, context, new_tokens), produced=batch)


def prefill(config: ModelConfig, serving: Serving, batch: int, prompt: int) -> Step:
    """Reading `batch` prompts of `prompt` tokens and producing the first token of each."""
    check(config, serving)
    return _step(config, serving, whole_sequences(batch, prompt), produced=batch)


def speculative_decode(
    config: ModelConfig, serving: Serving, batch: int, context: int, acceptance: float, drafts: int = 1
) -> Step:
    """A step that drafts `drafts` tokens with the prediction layer and verifies them in one call.

    A draft is accepted with probability p when all before it were: 1 + p + ... + p^drafts tokens a step.
    """
    if not config.num_nextn_predict_layers:
        raise ConfigError(
            "num_nextn_predict_layers is 0; speculation needs a prediction layer", hint="leave acceptance out"
        )
    if not 0.0 <= acceptance <= 1.0:
        raise ConfigError(f"acceptance is {acceptance}; allowed: 0 to 1")
    require_positive("drafts", drafts)
    plain = replace(serving, include_mtp=False)
    verify = decode(config, plain, batch, context, 1 + drafts)
    one = decode(config, plain, batch, context)
    drafting = decode(config, replace(serving, include_mtp=True), batch, context)
    share = drafts / config.num_nextn_predict_layers
    return Step(
        verify.compute_seconds + share * (drafting.compute_seconds - one.compute_seconds),
        verify.communication_seconds + share * (drafting.communication_seconds - one.communication_seconds),
        batch * sum(acceptance**k for k in range(drafts + 1)),
    )


def gpu_operations(config: ModelConfig, serving: Serving, call: Call) -> list[Operation]:
    """The operations of a call on the busiest GPU: its part of attention, and 1 / gpus of the experts' work."""
    formats = {"weights": serving.weights, "cache": serving.cache, "include_mtp": serving.include_mtp}
    experts = [one for one in forward_operations(config, call, **formats) if one.part == "routed"]
    if serving.attention == "data":
        local = replace(call, sequences=sequences_per_gpu(serving, call.sequences))
        rest = forward_operations(config, local, **formats)
    else:
        rest = forward_operations(rank_config(config, serving.gpus), call, **formats)
        rest = [_divided(one, serving.gpus) if one.part in ("head", "shared") else one for one in rest]
    rest = [_last_position(one, call) for one in rest if one.part != "routed"]
    return [*rest, *(_divided(one, serving.gpus) for one in experts)]


def _divided(one: Operation, ways: int) -> Operation:
    return replace(
        one,
        flops=one.flops / ways,
        weight_bytes=one.weight_bytes / ways,
        activation_bytes=one.activation_bytes / ways,
    )


def _last_position(one: Operation, call: Call) -> Operation:
    """Prefill asks the head for the last position of a sequence alone."""
    if one.part != "head" or call.cached is not None:
        return one
    return replace(one, flops=one.flops / call.new_tokens, activation_bytes=one.activation_bytes / call.new_tokens)


def _step(config: ModelConfig, serving: Serving, call: Call, produced: int) -> Step:
    compute = total_seconds(roofline(gpu_operations(config, serving, call), serving.device))
    return Step(compute, communication_seconds(config, serving, call), produced)


def communication_seconds(config: ModelConfig, serving: Serving, call: Call) -> float:
    """Time on the links of the busiest GPU, nothing overlapped, latency left out.

    tensor: two ring all-reduces a layer of [T, D] in bf16. data: dispatch (in the weights' precision) and combine
    (bf16) of each token to its K experts; across nodes a token travels once to each node it needs.
    """
    gpus, device = serving.gpus, serving.device
    if gpus == 1:
        return 0.0
    spans_nodes = gpus > device.devices_per_node
    bandwidth = (device.network_bandwidth if spans_nodes else device.node_bandwidth).value
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if serving.include_mtp else 0)
    remote = (gpus - 1) / gpus
    if serving.attention == "tensor":
        return layers * 2 * 2 * remote * call.tokens * config.hidden_size * 2 / bandwidth
    expert_layers = sum(config.is_expert_layer(layer) for layer in range(layers))
    copies = config.num_experts_per_tok
    if spans_nodes:
        nodes = gpus // device.devices_per_node
        remote = (nodes - 1) / nodes
        copies = min(copies, nodes, config.topk_group if config.n_group > 1 else copies)
    tokens = sequences_per_gpu(serving, call.sequences) * call.new_tokens
    bytes_each = (1 if serving.weights == "fp8" else 2) + 2
    return expert_layers * remote * tokens * copies * config.hidden_size * bytes_each / bandwidth

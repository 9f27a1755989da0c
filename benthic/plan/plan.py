"""One plan: everything the planner knows about a model on a device, as plain data with fixed keys.

`benthic plan --json` prints it, the tables render it, `--compare` puts several side by side.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, get_args

from benthic.config import ModelConfig
from benthic.plan.devices import Device
from benthic.plan.expert_load import Routing, simulate
from benthic.plan.explain import explain_model, explain_serving
from benthic.plan.flops import decode_flops_per_token, forward_flops_per_token, training_flops_per_token
from benthic.plan.inference import (
    RESERVED_MEMORY,
    Serving,
    cache_bytes_per_token_per_gpu,
    decode,
    fewest_gpus,
    free_bytes_per_gpu,
    gpu_operations,
    largest_batch,
    longest_context,
    prefill,
    speculative_decode,
    weight_bytes_per_gpu,
)
from benthic.plan.kv_cache import (
    bytes_per_token_if,
    cache_bytes_per_token,
    elements_per_token,
    expanded_elements_per_token,
)
from benthic.plan.operations import decode_step, expected_experts, whole_sequences
from benthic.plan.parameters import count_parameters, stored_bytes, stored_format, weight_bytes
from benthic.plan.request import PlanRequest, resolve_serving
from benthic.plan.roofline import TimedOperation, roofline
from benthic.plan.training_plan import describe, describe_cost, plan_training
from benthic.plan.training_plan import explain as explain_training

SHOWN_BATCHES = (1, 8, 32, 128, 512)


def make_plan(config: ModelConfig, request: PlanRequest, name: str = "model") -> dict[str, Any]:
    """The plan as plain data: model, parameters, kv_cache, flops, memory, serving, training, cost, assumptions."""
    serving, choices = resolve_serving(config, request)
    training = plan_training(config, request)
    return {
        "model": name,
        "architecture": _architecture(config),
        "parameters": _parameters(config),
        "kv_cache": _kv_cache(config, request),
        "flops": _flops(config, request),
        "memory": {
            "weights_bytes": weight_bytes(config, serving.weights),
            "stored_bytes": stored_bytes(config, stored_format(config)),
            "weights_format": serving.weights,
            "stored_format": stored_format(config),
            "training_bytes_per_gpu": round(training.memory.total),
            "by_part": {part: round(size) for part, size in training.memory.by_part.items()},
        },
        "serving": _serving(config, request, serving),
        "training": describe(training),
        "cost": describe_cost(training, request.tokens),
        "assumptions": [*choices, *training.choices, *_assumptions(serving), *training.memory.assumptions],
    }


def _architecture(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention": config.attention_kind,
        "layers": config.num_hidden_layers,
        "expert_layers": config.num_expert_layers,
        "prediction_layers": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "routed_experts": config.n_routed_experts or 0,
        "experts_per_token": config.num_experts_per_tok if config.n_routed_experts else 0,
        "shared_experts": config.n_shared_experts,
        "vocab_size": config.vocab_size,
        "max_context": config.max_position_embeddings,
    }


def _parameters(config: ModelConfig) -> dict[str, int]:
    count = count_parameters(config)
    return {
        "total": count.total,
        "active": count.active,
        "active_without_input_embedding": count.active_without_input_embedding,
        **{key: value for key, value in asdict(count).items() if key != "routed_active"},
        "stored": count.stored,
    }


def _kv_cache(config: ModelConfig, request: PlanRequest) -> dict[str, Any]:
    compared = {kind: _whole(value) for kind, value in bytes_per_token_if(config, request.cache).items()}
    one = cache_bytes_per_token(config, request.cache)
    found = {
        "kind": config.attention_kind,
        "format": request.cache,
        "elements_per_token": elements_per_token(config),
        "bytes_per_token": _whole(one),
        "bytes_per_token_if": compared,
        "bytes_at_context": _whole(one * request.context),
        "context": request.context,
    }
    if config.kv_lora_rank:
        found["elements_per_token_if_expanded"] = expanded_elements_per_token(config)
    if config.num_nextn_predict_layers:
        found["bytes_per_token_with_mtp"] = _whole(cache_bytes_per_token(config, request.cache, include_mtp=True))
    return found


def _flops(config: ModelConfig, request: PlanRequest) -> dict[str, Any]:
    length, context = request.sequence_length, request.context
    found = {
        "sequence_length": length,
        "context": context,
        "forward_per_token": _whole(forward_flops_per_token(config, length)),
        "training_per_token_causal": _whole(training_flops_per_token(config, length)),
        "training_per_token_full": _whole(training_flops_per_token(config, length, "full")),
        "decode_per_token": _whole(decode_flops_per_token(config, context)),
    }
    if config.num_nextn_predict_layers:
        for convention in ("causal", "full"):
            value = training_flops_per_token(config, length, convention, include_mtp=True)
            found[f"training_per_token_{convention}_with_mtp"] = _whole(value)
    return found


def _serving(config: ModelConfig, request: PlanRequest, serving: Serving) -> dict[str, Any]:
    batch = request.batch or 1
    most = largest_batch(config, serving, request.context)
    longest = longest_context(config, serving, batch)
    return {
        "device": serving.device.name,
        "gpus": serving.gpus,
        "attention": serving.attention,
        "weights": serving.weights,
        "cache": serving.cache,
        "weights_bytes_per_gpu": weight_bytes_per_gpu(config, serving),
        "free_bytes_per_gpu": free_bytes_per_gpu(config, serving),
        "cache_bytes_per_token_per_gpu": _whole(cache_bytes_per_token_per_gpu(config, serving)),
        "batch": batch,
        "context": request.context,
        "fits": longest >= request.context,
        "longest_context": longest,
        "longest_context_trained": config.max_position_embeddings,
        "largest_batch": most,
        "fewest_gpus": fewest_gpus(config, serving, batch, request.context),
        "prefill_seconds": prefill(config, serving, batch, request.context).seconds,
        "steps": [_step(config, request, serving, size) for size in _batches(request, most)],
    }


def _batches(request: PlanRequest, most: int) -> list[int]:
    if request.batch:
        return [request.batch]
    return [size for size in SHOWN_BATCHES if size <= most] or [1]


def _step(config: ModelConfig, request: PlanRequest, serving: Serving, batch: int) -> dict[str, Any]:
    plain = decode(config, serving, batch, request.context)
    found: dict[str, Any] = {
        "batch": batch,
        "seconds_per_token": plain.seconds,
        "communication_seconds": plain.communication_seconds,
        "tokens_per_second": plain.tokens_per_second,
        "tokens_per_second_per_gpu": plain.tokens_per_second / serving.gpus,
    }
    if config.n_routed_experts:
        found["experts_touched"] = expected_experts(config, batch)
    if config.num_nextn_predict_layers:
        drafted = speculative_decode(config, serving, batch, request.context, request.acceptance)
        found["speculative"] = {
            "acceptance": request.acceptance,
            "tokens_per_step": drafted.tokens / batch,
            "seconds_per_token": drafted.seconds * batch / drafted.tokens,
            "tokens_per_second": drafted.tokens_per_second,
        }
    return found


def _assumptions(serving: Serving) -> list[str]:
    device: Device = serving.device
    found = [
        f"memory bandwidth {device.memory_bandwidth.value / 1e12:.2f} TB/s: {device.memory_bandwidth.source}",
        f"{RESERVED_MEMORY:.0%} of memory reserved for activations, graphs and fragmentation",
        "experts are chosen uniformly and independently; times are floors without launch costs",
    ]
    if serving.gpus > 1:
        link = device.network_bandwidth if serving.gpus > device.devices_per_node else device.node_bandwidth
        found.append(f"links {link.value / 1e9:.0f} GB/s a GPU: {link.source}; nothing overlapped")
    return found


def plan_expert_load(config: ModelConfig) -> list[dict[str, Any]]:
    """Simulated loads under random, skewed and balanced routing, with and without the limit on groups if there is one.

    Experts lie on up to 64 devices of 8 nodes, as many as divide them. Raises ConfigError for a dense model.
    """
    devices = math.gcd(64, config.n_routed_experts or 1)
    nodes = math.gcd(8, devices)
    limits = (True, False) if config.topk_group < config.n_group else (False,)
    found = []
    for routing in get_args(Routing):
        for limit in limits:
            load = simulate(config, routing, devices=devices, nodes=nodes, group_limit=limit)
            places = {"group_limit": limit, "devices": devices, "nodes": nodes, "idle_experts": load.idle_experts}
            found.append(asdict(load) | places)
    return found


def explain_plan(config: ModelConfig, request: PlanRequest) -> dict[str, Any]:
    """How a plan's figures come about: `lines` as formula, numbers and value, the addends of `training`'s memory and
    step, and the roofline of each operation on
    the busiest GPU in one `decode` step and in one `prefill`."""
    serving, _ = resolve_serving(config, request)
    batch, context = request.batch or 1, request.context
    lines = explain_model(config, request.sequence_length, context, request.cache)
    lines += explain_serving(config, serving, batch, context)
    training = plan_training(config, request)
    calls = {"decode": decode_step(batch, context), "prefill": whole_sequences(batch, context)}
    found = {
        "lines": [asdict(line) for line in lines],
        "training": explain_training(training),
        "training_assumptions": list(training.cost.assumptions),
    }
    for name, call in calls.items():
        operations = gpu_operations(config, serving, call)
        found[name] = [_timed(one) for one in roofline(operations, serving.device)]
    return found


def _timed(one: TimedOperation) -> dict[str, Any]:
    return {
        "name": one.operation.name,
        "count": one.operation.count,
        "flops": one.operation.total_flops,
        "bytes": one.operation.total_bytes,
        "flops_per_byte": one.operation.intensity,
        "seconds": one.seconds,
        "bound": one.bound,
        "rate": one.rate.source if one.rate else "memory bandwidth",
    }


def _whole(value: float) -> float | int:
    """Integers as integers, so that JSON shows 70272 and not 70272.0."""
    return int(value) if float(value).is_integer() else value

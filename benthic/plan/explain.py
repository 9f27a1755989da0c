"""Each figure of a plan as a formula in letters, the same with this model's numbers, and the value.

The value comes from the code that the trainer and the engine use; a test evaluates the numbers and holds the two
together. Letters: D hidden_size, V vocab_size, L layers, H heads, H_kv key-value heads, d head width, C kv_lora_rank,
r q_lora_rank, N, R and v the no-position, rotary and value widths, E experts, K chosen, F expert width, P active
parameters without the input embedding (P_mtp: of the prediction layers, shared head included), S sequence length,
T context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benthic.config import ModelConfig
from benthic.config.model import AttentionKind
from benthic.plan.flops import decode_flops_per_token, forward_flops_per_token, training_flops_per_token
from benthic.plan.inference import (
    RESERVED_MEMORY,
    Serving,
    cache_bytes_per_token_per_gpu,
    free_bytes_per_gpu,
    largest_batch,
    longest_context,
    sequences_per_gpu,
    weight_bytes_per_gpu,
)
from benthic.plan.kv_cache import (
    CACHE_BITS,
    CacheFormat,
    cache_bytes_per_token,
    compared_groups,
    elements_per_token,
    expanded_elements_per_token,
)
from benthic.plan.operations import expected_experts
from benthic.plan.parameters import ParameterCount, count_parameters, repeated_parameters

Letters = dict[str, int]


@dataclass(frozen=True, slots=True)
class Line:
    """One figure: `formula` in letters, `numbers` the same expression with values, both in Python's notation."""

    section: str
    name: str
    formula: str
    numbers: str
    value: float
    unit: str


def make_line(section: str, name: str, formula: str, letters: Mapping[str, float], value: float, unit: str) -> Line:
    """A line whose numbers are `formula` with each letter replaced."""
    numbers = re.sub(r"[A-Za-z_]\w*", lambda match: f"{letters[match.group()]:.16g}", formula)
    return Line(section, name, formula, numbers, value, unit)


def explain_model(
    config: ModelConfig, sequence_length: int = 4096, context: int = 4096, cache: CacheFormat = "bf16"
) -> list[Line]:
    """The lines of a model's parameters, cache and FLOPs."""
    letters = letters_of(config) | {"S": sequence_length, "T": context}
    return [
        *_parameter_lines(config, letters),
        *_cache_lines(config, letters, cache),
        *_flops_lines(config, letters),
    ]


def letters_of(config: ModelConfig) -> Letters:
    """The letters of the formulas and their values."""
    letters = {
        "D": config.hidden_size,
        "V": config.vocab_size,
        "L": config.num_hidden_layers,
        "L_dense": config.num_hidden_layers - config.num_expert_layers,
        "L_moe": config.num_expert_layers,
        "L_mtp": config.num_nextn_predict_layers,
        "H": config.num_attention_heads,
        "H_kv": config.num_key_value_heads,
        "d": config.query_head_dim,
        "v": config.value_head_dim,
        "F_dense": config.intermediate_size,
        "groups": compared_groups(config),
    }
    if config.kv_lora_rank:
        letters |= {"C": config.kv_lora_rank, "N": config.qk_nope_head_dim, "R": config.qk_rope_head_dim}
        letters |= {"r": config.q_lora_rank or 0}
    if config.n_routed_experts:
        letters |= {"E": config.n_routed_experts, "K": config.num_experts_per_tok, "F": config.moe_intermediate_size}
        letters |= {"E_shared": config.n_shared_experts}
    return letters


def attention_formula(config: ModelConfig) -> str:
    """Parameters of one attention layer, norms inside it included."""
    if config.kv_lora_rank:
        query = "D*r + r + r*H*(N+R)" if config.q_lora_rank else "D*H*(N+R)"
        bias = (" + r" if config.q_lora_rank and config.qkv_bias else "") + (" + C + R" if config.qkv_bias else "")
        terms = query + " + D*(C+R) + C + C*H*(N+v) + H*v*D" + bias
    else:
        terms = "D*d*(H + 2*H_kv) + H*d*D"
        terms += " + d*(H + 2*H_kv)" if config.qkv_bias else ""
        terms += " + d*(H + H_kv)" if config.qk_norm else ""
    return terms + (" + D" if config.output_bias else "")


def _parameter_lines(config: ModelConfig, letters: Letters) -> Iterator[Line]:
    count = count_parameters(config)

    def line(name: str, formula: str, value: int) -> Line:
        return make_line("parameters", name, formula, letters, value, "parameters")

    yield line("input embedding", "V*D", count.embedding)
    if count.head:
        yield line("head", "V*D", count.head)
    yield line("attention, one layer", attention_formula(config), count.attention // config.num_hidden_layers)
    yield line("attention", f"L*({attention_formula(config)})", count.attention)
    if letters["L_dense"]:
        yield line("dense feed-forward", "L_dense*3*D*F_dense", count.dense)
    if config.n_routed_experts:
        yield line("routed experts", "L_moe*E*3*D*F", count.routed)
        yield line("routed experts, active", "L_moe*K*3*D*F", count.routed_active)
        if config.n_shared_experts:
            yield line("shared experts", "L_moe*3*D*F*E_shared", count.shared)
        bias = " + E" if config.has_routing_bias else ""
        yield line("router", f"L_moe*(D*E{bias})", count.router)
    yield line("norms", "2*L*D + D", count.norm)
    yield _sum_line("total", count)
    letters |= {"total": count.total, "routed": count.routed, "routed_active": count.routed_active}
    letters |= {"embedding": count.embedding, "active": count.active}
    yield line("active", "total - routed + routed_active", count.active)
    if count.head:
        yield line("active without input embedding", "active - embedding", count.active_without_input_embedding)
    if count.mtp_unique:
        own = (count.mtp_unique - _prediction_extras(config)) // config.num_nextn_predict_layers
        letters |= {"layer": own}
        yield line("MTP layers, unique", "L_mtp*(layer + 2*D*D + 3*D)", count.mtp_unique)
        yield line("MTP layers, as stored", "L_mtp*(layer + 2*D*D + 3*D + 2*V*D)", count.mtp_stored)


def _prediction_extras(config: ModelConfig) -> int:
    return sum(one.count * one.row.size for one in repeated_parameters(config) if one.part == "prediction")


def _sum_line(name: str, count: ParameterCount) -> Line:
    parts = {part: getattr(count, part) for part in ParameterCount.__slots__[:8]}
    letters = {part: size for part, size in parts.items() if size}
    return make_line("parameters", name, " + ".join(letters), letters, count.total, "parameters")


def _cache_lines(config: ModelConfig, letters: Letters, cache: CacheFormat) -> Iterator[Line]:
    def line(name: str, formula: str, value: float, unit: str = "elements a token") -> Line:
        return make_line("kv_cache", name, formula, letters, value, unit)

    pair = "(N + v)" if config.kv_lora_rank else "2*d"
    own = config.attention_kind
    gqa = "H_kv" if own == "gqa" else "groups"
    formulas: dict[AttentionKind, str] = {"mha": f"H*{pair}*L", "gqa": f"{gqa}*{pair}*L", "mqa": f"{pair}*L"}
    formulas["mla"] = "(C + R)*L" if own == "mla" else "(4*d + d//2)*L"
    for kind, formula in formulas.items():
        label = f"{kind.upper()} (this model)" if kind == own else f"as {kind.upper()}"
        yield line(label, formula, elements_per_token(config, kind))
    if own == "mla":
        yield line("every head expanded", "H*(N + R + v)*L", expanded_elements_per_token(config))
    if cache in CACHE_BITS:
        letters |= {"elements": elements_per_token(config), "bits": CACHE_BITS[cache]}
        yield line(f"bytes in {cache}", "elements*bits/8", cache_bytes_per_token(config, cache), "bytes a token")
    else:
        value = cache_bytes_per_token(config, cache)
        yield line(f"bytes in {cache}", "(C + 4*-(-C//128) + 2*R)*L", value, "bytes a token")


def _flops_lines(config: ModelConfig, letters: Letters) -> Iterator[Line]:
    sequence, context = letters["S"], letters["T"]
    count = count_parameters(config)
    head = config.num_nextn_predict_layers * config.vocab_size * config.hidden_size
    letters |= {"P": count.active_without_input_embedding, "P_mtp": count.mtp_active + head}

    def line(name: str, formula: str, value: float) -> Line:
        return make_line("flops", name, formula, letters, value, "FLOPs a token")

    core = "2*{layers}*{length}*H*(d+v)"
    causal = core.format(layers="L", length="S/2")
    yield line("forward, causal", f"2*P + {causal}", forward_flops_per_token(config, sequence))
    yield line("training, causal", f"3*(2*P + {causal})", training_flops_per_token(config, sequence))
    full = core.format(layers="L", length="S")
    yield line("training, full attention", f"3*(2*P + {full})", training_flops_per_token(config, sequence, "full"))
    if config.num_nextn_predict_layers:
        added = core.format(layers="L_mtp", length="S/2")
        value = training_flops_per_token(config, sequence, include_mtp=True)
        yield line("training with MTP, causal", f"3*(2*P + {causal} + 2*P_mtp + {added})", value)
    widths = "(2*C + R)" if config.kv_lora_rank else "(d + v)"
    yield line("decode", f"2*P + 2*L*T*H*{widths}", decode_flops_per_token(config, context))


def explain_serving(config: ModelConfig, serving: Serving, batch: int, context: int) -> Iterator[Line]:
    """The lines of serving `batch` sequences at `context` positions: what is left for the cache, and what fits."""
    free = free_bytes_per_gpu(config, serving)
    letters = {
        "memory": serving.device.memory_bytes,
        "weights": weight_bytes_per_gpu(config, serving),
        "token": cache_bytes_per_token_per_gpu(config, serving),
        "batch_per_gpu": sequences_per_gpu(serving, batch),
        "free": free,
        "T": context,
        "gpus": serving.gpus,
        "E": config.n_routed_experts or 0,
        "K": config.num_experts_per_tok,
        "batch": batch,
    }

    def line(name: str, formula: str, value: float, unit: str) -> Line:
        return make_line("serving", name, formula, letters, value, unit)

    yield line("free for the cache, each GPU", f"memory*{1 - RESERVED_MEMORY} - weights", free, "bytes")
    if free > 0:
        longest = longest_context(config, serving, batch)
        yield line("longest context", "free // (token*batch_per_gpu)", longest, "positions")
        ways = "*gpus" if serving.attention == "data" else ""
        most = largest_batch(config, serving, context)
        yield line("largest batch", f"free // (token*T){ways}", most, "sequences")
    if config.n_routed_experts:
        touched = expected_experts(config, batch)
        yield line("experts a step touches, each layer", "E*(1 - (1 - K/E)**batch)", touched, "experts")

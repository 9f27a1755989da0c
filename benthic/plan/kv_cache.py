"""What a token costs in the cache of keys and values, for the model as it is and as it would be with other attention.

DeepSeek-V2 paper, table 1, elements a token of a model of `l` layers: MHA 2 n_h d_h l, GQA 2 n_g d_h l, MQA 2 d_h l,
MLA (d_c + d_h^R) l. The latent and its rotary key are one, shared by all heads: tensor parallelism replicates them,
where it divides the heads of MHA and GQA. A quantised cache here is its elements alone, but for fp8_ds_mla, whose
scales and 16-bit rotary key are part of the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benthic.config import ModelConfig
from benthic.config.model import AttentionKind
from benthic.errors import ConfigError, did_you_mean

CacheFormat = Literal["fp32", "bf16", "fp8", "fp8_ds_mla", "int8", "int6", "int4"]
CACHE_BITS: dict[CacheFormat, int] = {"fp32": 32, "bf16": 16, "fp8": 8, "int8": 8, "int6": 6, "int4": 4}
CACHE_FORMATS: tuple[CacheFormat, ...] = (*CACHE_BITS, "fp8_ds_mla")
COMPARED_GROUPS = 8
"""Key-value heads of the GQA that a model without GQA is compared with."""


@dataclass(frozen=True, slots=True)
class HeadWidths:
    """Elements of one head's key and value in a conventional cache."""

    key: int
    value: int


def conventional_head(config: ModelConfig) -> HeadWidths:
    """The head that MHA, GQA and MQA of this model would cache: for MLA its no-position and value widths (V2 paper)."""
    if config.kv_lora_rank:
        return HeadWidths(config.qk_nope_head_dim, config.v_head_dim)
    return HeadWidths(config.query_head_dim, config.value_head_dim)


def elements_per_layer(config: ModelConfig, kind: AttentionKind | None = None) -> int:
    """Elements one token adds to the cache of one layer, with the model's own attention or with `kind`.

    A model without a latent is compared with the V2 paper's choice for one, d_c = 4 d_h and d_h^R = d_h / 2; a model
    without groups with `COMPARED_GROUPS` of them, or the largest smaller number that divides its heads.
    """
    own = config.attention_kind
    kind = kind or own
    head = conventional_head(config)
    if kind == "mla":
        if own == "mla":
            return config.kv_lora_rank + config.qk_rope_head_dim
        return 4 * head.key + head.key // 2
    return _cached_heads(config, kind) * (head.key + head.value)


def _cached_heads(config: ModelConfig, kind: AttentionKind) -> int:
    if kind == config.attention_kind:
        return config.num_key_value_heads
    if kind == "mha":
        return config.num_attention_heads
    return 1 if kind == "mqa" else compared_groups(config)


def compared_groups(config: ModelConfig) -> int:
    """Key-value heads of the GQA variant of a model."""
    if config.attention_kind == "gqa":
        return config.num_key_value_heads
    heads = config.num_attention_heads
    return next(groups for groups in range(min(COMPARED_GROUPS, heads), 0, -1) if heads % groups == 0)


def elements_per_token(config: ModelConfig, kind: AttentionKind | None = None, include_mtp: bool = False) -> int:
    """Elements one token adds to the cache of the whole model."""
    return elements_per_layer(config, kind) * _layers(config, include_mtp)


def expanded_elements_per_token(config: ModelConfig) -> int:
    """Elements a token takes where an implementation caches every head's full key and value instead of the latent."""
    heads = config.num_key_value_heads
    return heads * (config.query_head_dim + config.value_head_dim) * config.num_hidden_layers


def cache_bytes_per_layer(config: ModelConfig, cache: CacheFormat = "bf16", kind: AttentionKind | None = None) -> float:
    """Bytes one token adds to the cache of one layer.

    fp8_ds_mla: e4m3 latent, a 4-byte scale for each 128 of it, rotary key in 16 bits (656 bytes for V3).
    """
    if cache == "fp8_ds_mla":
        if (kind or config.attention_kind) != "mla" or not config.kv_lora_rank:
            raise ConfigError(
                f"cache format 'fp8_ds_mla' is for latent attention; this is {kind or config.attention_kind}",
                hint="use fp8",
            )
        return config.kv_lora_rank + 4 * -(-config.kv_lora_rank // 128) + 2 * config.qk_rope_head_dim
    if cache not in CACHE_BITS:
        raise ConfigError(f"unknown cache format {cache!r}", hint=did_you_mean(cache, CACHE_FORMATS))
    return elements_per_layer(config, kind) * CACHE_BITS[cache] / 8


def cache_bytes_per_token(
    config: ModelConfig,
    cache: CacheFormat = "bf16",
    kind: AttentionKind | None = None,
    include_mtp: bool = False,
) -> float:
    """Bytes one token adds to the cache of the whole model."""
    return cache_bytes_per_layer(config, cache, kind) * _layers(config, include_mtp)


def bytes_per_token_if(config: ModelConfig, cache: CacheFormat = "bf16") -> dict[str, float]:
    """Bytes a token with each kind of attention, layers and heads being the same."""
    kinds: tuple[AttentionKind, ...] = ("mha", "gqa", "mqa", "mla")
    plain: CacheFormat = "fp8" if cache == "fp8_ds_mla" else cache
    own = config.attention_kind
    return {kind: cache_bytes_per_token(config, cache if kind == own else plain, kind) for kind in kinds}


def bytes_per_token_of_rank(
    config: ModelConfig, tensor_parallel: int, cache: CacheFormat = "bf16", include_mtp: bool = False
) -> float:
    """Bytes a token on each rank when heads are split over `tensor_parallel` ranks.

    The latent of MLA is one for all heads and is held by every rank; key-value heads are divided until one is left.
    """
    if tensor_parallel <= 0 or config.num_attention_heads % tensor_parallel:
        raise ConfigError(
            f"tensor parallel size is {tensor_parallel}; it must divide num_attention_heads "
            f"({config.num_attention_heads})"
        )
    whole = cache_bytes_per_token(config, cache, include_mtp=include_mtp)
    if config.kv_lora_rank:
        return whole
    return whole * -(-config.num_key_value_heads // tensor_parallel) / config.num_key_value_heads


def _layers(config: ModelConfig, include_mtp: bool) -> int:
    return config.num_hidden_layers + (config.num_nextn_predict_layers if include_mtp else 0)

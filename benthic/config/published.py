"""Published `config.json` files to ModelConfig and back: the only place that knows their spellings.

Read: DeepSeek's own files and transformers 4 (`torch_dtype`, `rope_theta` + `rope_scaling`,
`num_nextn_predict_layers`) and transformers 5 (`dtype`, `rope_parameters`, `num_mtp_layers`).
Written: what transformers 5 loads. A model that no published architecture describes is written with
`model_type` "benthic" and ModelConfig's own fields, so that nothing loads it as something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benthic.config.model import ModelConfig
from benthic.config.settings import read_text, refuse_unknown_keys
from benthic.errors import ConfigError, did_you_mean

PRESETS = Path(__file__).parent / "presets"

_MOE_KEYS = (
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace moe_layer_freq "
    "n_group topk_group scoring_func topk_method norm_topk_prob routed_scaling_factor aux_loss_alpha seq_aux"
).split()
_MLA_KEYS = "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split()
_COMMON_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings "
    "bos_token_id eos_token_id pad_token_id quantization_config"
).split()
_REQUIRED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
).split()
# Sizes of experts, which no two models share and whose defaults differ between readers of these files. Where a key may
# be null (no experts, no query compression), the null must be there.
_EXPERT_SIZES = ("n_routed_experts", "num_experts_per_tok", "first_k_dense_replace")
_V3_SIZES = (*_EXPERT_SIZES, "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor")
_STATED_KEYS = {
    "deepseek_v3": _V3_SIZES,
    "kimi_k2": _V3_SIZES,
    "deepseek_v2": (*_EXPERT_SIZES, "q_lora_rank"),
    "deepseek": _EXPERT_SIZES,
}

# Keys that say nothing about the mathematics of this family, as transformers and the released files write them.
_IGNORED_KEYS = frozenset(
    "_name_or_path architectures auto_map model_type transformers_version use_cache pretraining_tp ep_size "
    "output_router_logits output_attentions output_hidden_states return_dict chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type qk_head_dim max_window_layers "
    "total_parameters unsloth_fixed use_return_dict is_decoder add_cross_attention "
    "torchscript task_specific_params finetuning_task tf_legacy_loss tie_encoder_decoder router_aux_loss_coef".split()
)
# Keys that change the mathematics; benthic holds only the released values, and says so otherwise.
_ONE_VALUE_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "clip_qkv": (None,),
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_interleave")
_SPELLING_KEYS = ("dtype", "torch_dtype", "num_mtp_layers", "num_nextn_predict_layers", "attention_bias", "head_dim")

# What a family's modelling code assumes when its config.json is silent.
_V3 = dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
_SOFTMAX = dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "deepseek_v2": _SOFTMAX,
    "deepseek": _SOFTMAX,
    "llama": {},
    "olmo2": {},
    "qwen2": {},
}
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "benthic": "BenthicForCausalLM",
}


def preset_names() -> list[str]:
    """Names of the configs that come with benthic."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_config(name: str | Path) -> ModelConfig:
    """See ModelConfig.from_pretrained."""
    path = Path(name)
    if len(path.name.encode(errors="replace")) > 255:
        raise ConfigError(
            f"no model is named {path.name[:40]!r}...: {len(path.name)} characters are too many for a file"
        )
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"no config.json in {path.parent}", hint="a model folder holds config.json and weights")
    elif not path.is_file():
        path = PRESETS / f"{str(name).lower().rsplit('/', 1)[-1]}.json"
        if not path.is_file():
            raise ConfigError(
                f"{str(name)!r} is neither a preset nor a folder or file that exists",
                hint=did_you_mean(str(name).lower(), preset_names()),
            )
    return config_from_published(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ConfigError naming the place of the fault."""
    text = read_text(path, "configuration")
    try:
        data = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ConfigError(f"{path} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits, or a key given twice
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not a JSON object")
    return data


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if [one for one, _ in pairs].count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found


def config_from_published(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a published config. Raises ConfigError naming the field; never guesses a foreign architecture."""
    family = data.get("model_type")
    try:
        if family == "benthic":
            own = {k: v for k, v in data.items() if k not in ("model_type", "architectures", "transformers_version")}
            return ModelConfig(**own)
        if not isinstance(family, str) or family not in _DEFAULTS:
            raise ConfigError(
                f"model_type is {family!r}, which benthic does not hold",
                hint="allowed: " + ", ".join([*_DEFAULTS, "benthic"]),
            )
        return ModelConfig(**_fields(data, family))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.hint) from None


def _fields(data: dict[str, Any], family: str) -> dict[str, Any]:
    latent = family in ("deepseek_v3", "deepseek_v2", "kimi_k2")
    family_keys = (_MLA_KEYS if latent else []) + (_MOE_KEYS if _DEFAULTS[family] else [])
    allowed = {*_COMMON_KEYS, *family_keys, *_ONE_VALUE_KEYS, *_ROPE_KEYS, *_SPELLING_KEYS, *_IGNORED_KEYS}
    refuse_unknown_keys(data, [*allowed, "layer_types"], f"a {family} config")
    _refuse_other_values(data)
    required = _REQUIRED_KEYS + (_MLA_KEYS[:1] + _MLA_KEYS[2:] if latent else [])
    missing = [key for key in required if data.get(key) is None]
    missing += [key for key in _STATED_KEYS.get(family, ()) if key not in data]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}", hint=f"a {family} config must state them")
    _refuse_other_sizes(data, ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    given = {key: data[key] for key in [*_COMMON_KEYS, *family_keys] if data.get(key) is not None}
    fields = _DEFAULTS[family] | given
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    # DeepSeek's own inference files write "no query compression" as 0.
    if not fields.get("q_lora_rank", True):
        del fields["q_lora_rank"]
    if family == "deepseek_v2" and fields["norm_topk_prob"] and fields.get("routed_scaling_factor", 1.0) != 1.0:
        raise ConfigError(
            f"norm_topk_prob is true beside routed_scaling_factor {fields['routed_scaling_factor']}: DeepSeek-V2's own "
            "code then leaves the factor out, others apply it",
            hint="set routed_scaling_factor to 1.0, or norm_topk_prob to false as in every released V2",
        )
    fields["rope_parameters"] = _rope(data, fields["max_position_embeddings"])
    if isinstance(fields.get("quantization_config"), dict):
        fields["quantization_config"] = _quantization(fields["quantization_config"])
    fields["rope_interleave"] = bool(data.get("rope_interleave", True)) if latent else False
    fields["dtype"] = data.get("dtype") or data.get("torch_dtype") or "bfloat16"
    fields["num_nextn_predict_layers"] = data.get("num_nextn_predict_layers") or data.get("num_mtp_layers") or 0
    implied = fields["hidden_size"] / fields["num_attention_heads"]
    if not latent and data.get("head_dim") not in (None, implied):
        fields["head_dim"] = data["head_dim"]
    bias = bool(data.get("attention_bias"))
    fields["qkv_bias"] = bias or family == "qwen2"
    fields["output_bias"] = bias
    if family == "olmo2":
        fields |= {"norm_placement": "after", "qk_norm": True}
    return fields


def _refuse_other_sizes(data: dict[str, Any], keys: Iterable[str]) -> None:
    """For keys that arithmetic needs before ModelConfig looks at them."""
    for key in keys:
        value = data.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{key} is {value!r}; it must be a whole number above 0")


def _refuse_other_values(data: dict[str, Any]) -> None:
    for key, values in _ONE_VALUE_KEYS.items():
        # A sliding window that use_sliding_window switches off is not in force (Qwen2.5).
        if key == "sliding_window" and data.get("use_sliding_window") is False:
            continue
        if key in data and data[key] not in values:
            raise ConfigError(f"{key} is {data[key]!r}; benthic holds models with {key} {values[0]!r} only")
    kinds = data.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"layer_types is {data['layer_types']!r}; benthic holds full_attention layers only")


def _quantization(data: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers 5 adds: each tensor's own dtype says whether it is quantised, and "float" is fp32."""
    added = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize"}
    if data.get("expert_dtype", "fp8") == "fp8":
        added.add("expert_dtype")
    if data.get("scale_fmt") == "float":
        added.add("scale_fmt")
    return {key: value for key, value in data.items() if key not in added}


def _rope(data: dict[str, Any], max_positions: int) -> dict[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(data.get(key), dict | None):
            raise ConfigError(f"{key} is {data[key]!r}; it must be an object or null")
    nested = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope = {key: value for key, value in nested.items() if value is not None and key != "type"}
    rope.setdefault("rope_type", nested.get("type", "default"))
    rope.setdefault("rope_theta", 10000.0 if data.get("rope_theta") is None else data["rope_theta"])
    # transformers' fallbacks for a yarn block that leaves one of the two out.
    if rope["rope_type"] == "yarn":
        _refuse_other_sizes(nested, ("original_max_position_embeddings",))
        rope.setdefault("original_max_position_embeddings", max_positions)
        rope.setdefault("factor", max_positions / rope["original_max_position_embeddings"])
    return rope


def published_model_type(config: ModelConfig) -> str:
    """The transformers `model_type` whose modelling code computes exactly this config, or "benthic"."""
    if config.kv_lora_rank:
        return _latent_model_type(config)
    if config.num_nextn_predict_layers or config.rope_interleave:
        return "benthic"
    if config.n_routed_experts:
        plain = config.attention_kind == "mha" and config.head_dim is None and config.norm_placement == "before"
        bias_free = not (config.qk_norm or config.qkv_bias or config.output_bias)
        return "deepseek" if plain and bias_free and _is_plain_softmax(config) else "benthic"
    if config.norm_placement == "after" and config.qk_norm and config.qkv_bias == config.output_bias:
        return "olmo2"
    if config.norm_placement == "before" and not config.qk_norm:
        if config.qkv_bias == config.output_bias:
            return "llama"
        return "qwen2" if config.qkv_bias else "benthic"
    return "benthic"


def _is_plain_softmax(config: ModelConfig) -> bool:
    one_group = config.n_group == config.topk_group == 1
    return (
        config.scoring_func == "softmax"
        and config.topk_method == "greedy"
        and not config.norm_topk_prob
        and config.routed_scaling_factor == 1.0
        and one_group
    )


def _latent_model_type(config: ModelConfig) -> str:
    if not config.n_routed_experts or not config.n_shared_experts or config.moe_layer_freq != 1:
        return "benthic"
    if config.qkv_bias != config.output_bias:
        return "benthic"
    if config.scoring_func == "sigmoid" and config.topk_method == "noaux_tc":
        return "deepseek_v3"
    softmax = config.scoring_func == "softmax" and not config.norm_topk_prob
    known_method = config.topk_method in ("greedy", "group_limited_greedy")
    interleaved = config.rope_interleave and not config.num_nextn_predict_layers
    return "deepseek_v2" if softmax and known_method and interleaved else "benthic"


def config_to_published(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling transformers 5 reads."""
    family = published_model_type(config)
    fields = config.model_dump(mode="json", exclude_none=True)
    head = {"architectures": [_ARCHITECTURES[family]], "model_type": family}
    if family == "benthic":
        return head | fields
    latent = family in ("deepseek_v3", "deepseek_v2")
    keys = [*_COMMON_KEYS, *(_MLA_KEYS if latent else ()), *(_MOE_KEYS if _DEFAULTS[family] else ())]
    data = head | {key: fields.get(key) for key in keys if key in fields}
    if latent:
        data["q_lora_rank"] = config.q_lora_rank
        data["rope_interleave"] = config.rope_interleave
    elif family in ("llama", "olmo2", "qwen2"):
        data["head_dim"] = config.query_head_dim
    if family == "deepseek_v3":
        data["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    data["rope_parameters"] = _published_rope(config)
    return data | {
        "hidden_act": "silu",
        "attention_bias": config.output_bias,
        "attention_dropout": 0.0,
        "dtype": config.dtype,
        "use_cache": True,
    }


def _published_rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    names = {
        "default": (),
        "linear": ("factor", "mscale_all_dim"),
        "yarn": (
            "factor original_max_position_embeddings beta_fast beta_slow "
            "mscale mscale_all_dim attention_factor truncate"
        ).split(),
        "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor mscale_all_dim".split(),
    }[rope.rope_type]
    values = {name: getattr(rope, name) for name in ("rope_type", "rope_theta", *names)}
    return {name: value for name, value in values.items() if value is not None}

"""ModelConfig: one decoder-only language model of the DeepSeek family or a baseline beside it.

Field names are the published ones (`config.json` of DeepSeek-V3), so a reader of one knows the other.
What a published file leaves implicit in its `model_type` (norm placement, query-key norms, biases) is a field here.
Reading and writing the published spellings: `published.py`. Every parameter the config implies: `manifest.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from benthic.config.settings import Settings

AttentionKind = Literal["mla", "mha", "gqa", "mqa"]
ScoringFunction = Literal["sigmoid", "softmax"]
TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
NormPlacement = Literal["before", "after"]

LATENT_NORM_EPS = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (released modelling code)."""


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


Positive = Annotated[int, BeforeValidator(_no_truth_value), Field(gt=0, lt=2**48)]
"""A size or a count. Its upper bound is far beyond any machine, and keeps arithmetic on wrong input quick and exact."""
Layers = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=10_000)]
"""A number of layers, each of which costs work to plan."""
TokenIds = int | tuple[int, ...] | None

# A size that is None where the model has no such part. The validator below guarantees that latent sizes come together
# and expert sizes come together, so code behind `kv_lora_rank` or `is_expert_layer` reads them as integers; a type
# checker cannot follow that, and sees Any.
if TYPE_CHECKING:
    SizeOrNone = Any
else:
    SizeOrNone = Positive | None


class RopeParameters(Settings):
    """Rotary position embedding and its length extension; names as in transformers 5 `rope_parameters`."""

    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    rope_theta: float = Field(10000.0, gt=0)
    factor: float = Field(1.0, gt=0)
    original_max_position_embeddings: Positive | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.rope_type in ("yarn", "llama3") and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self

    @property
    def rotation_gain(self) -> float:
        """What cos and sin are multiplied by (1.0 for every released DeepSeek model; YaRN, arXiv:2309.00071)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_gain(self.factor, self.mscale) / yarn_gain(self.factor, self.mscale_all_dim)
        return yarn_gain(self.factor, 1.0)

    @property
    def softmax_gain(self) -> float:
        """What MLA's softmax scale is multiplied by: m^2 with m = 0.1 mscale_all_dim ln(factor) + 1."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_gain(self.factor, self.mscale_all_dim) ** 2


def yarn_gain(factor: float, mscale: float) -> float:
    """YaRN's m(factor, mscale): 1 when nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class Fp8Quantization(Settings):
    """How FP8 weights lie on disk: e4m3 values and one fp32 `weight_scale_inv` for each block."""

    quant_method: Literal["fp8"] = "fp8"
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[Positive, Positive] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None


class ModelConfig(Settings):
    """The shape and mathematics of one model. Sizes are counts; V3's letters: D hidden_size, V vocab_size,
    H num_attention_heads, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim, E n_routed_experts,
    K num_experts_per_tok, G n_group, F moe_intermediate_size."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Annotated[Layers, Field(gt=0)]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Positive
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()

    kv_lora_rank: SizeOrNone = None
    q_lora_rank: SizeOrNone = None
    qk_nope_head_dim: SizeOrNone = None
    qk_rope_head_dim: SizeOrNone = None
    v_head_dim: SizeOrNone = None
    rope_interleave: bool = True

    head_dim: SizeOrNone = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_placement: NormPlacement = "before"

    n_routed_experts: SizeOrNone = None
    n_shared_experts: int = Field(0, ge=0)
    num_experts_per_tok: Positive = 1
    moe_intermediate_size: SizeOrNone = None
    first_k_dense_replace: int = Field(0, ge=0)
    moe_layer_freq: Positive = 1
    n_group: Positive = 1
    topk_group: Positive = 1
    scoring_func: ScoringFunction = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0)
    aux_loss_alpha: float | None = Field(None, ge=0)
    seq_aux: bool | None = None
    """With aux_loss_alpha, a record alone: how the published weights were trained, kept so that config.json comes back
    as it was. Nothing computes with either; a run's own loss is set in BalanceConfig."""

    num_nextn_predict_layers: Layers = 0

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization_config: Fp8Quantization | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_mla(self) if self.kv_lora_rank else _check_plain_attention(self)
        if self.n_routed_experts:
            _check_experts(self)
        elif self.n_shared_experts:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts} but n_routed_experts is not set")
        if self.norm_placement == "after" and self.num_nextn_predict_layers:
            raise ValueError("num_nextn_predict_layers needs norm_placement 'before'")
        return self

    @classmethod
    def from_pretrained(cls, name: str | Path) -> ModelConfig:
        """A preset by name (`benthic plan --list`), a folder with `config.json`, or the path of such a file.

        Raises ConfigError when it is none of these, or when the file describes an architecture benthic does not hold.
        """
        from benthic.config.published import load_config

        return load_config(name)

    @property
    def attention_kind(self) -> AttentionKind:
        """mla when keys and values share a latent; otherwise by how many heads share a key."""
        if self.kv_lora_rank:
            return "mla"
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

    @property
    def query_head_dim(self) -> int:
        """Width of one head's query and key (N + R for MLA)."""
        if self.kv_lora_rank:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Width of one head's value."""
        return self.v_head_dim if self.kv_lora_rank else self.query_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head rotate."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.query_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on query-key products; MLA corrects it for YaRN at every length, short prompts too."""
        scale = self.query_head_dim**-0.5
        return scale * self.rope_parameters.softmax_gain if self.kv_lora_rank else scale

    @property
    def cache_width(self) -> int:
        """Elements a token keeps in one layer's cache: latent + rotary key, or all keys and values."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_key_value_heads * (self.query_head_dim + self.value_head_dim)

    @property
    def has_routing_bias(self) -> bool:
        """Whether routers carry `e_score_correction_bias` (auxiliary-loss-free balancing)."""
        return bool(self.n_routed_experts) and self.topk_method == "noaux_tc"

    def is_expert_layer(self, layer: int) -> bool:
        """Whether a layer routes to experts. Prediction layers (index >= num_hidden_layers) do if any layer can."""
        if not self.n_routed_experts:
            return False
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def num_expert_layers(self) -> int:
        """Expert layers of the main model, prediction layers left out."""
        return sum(self.is_expert_layer(layer) for layer in range(self.num_hidden_layers))


def _check_mla(config: ModelConfig) -> None:
    for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is required when kv_lora_rank is set (multi-head latent attention)")
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; rotation works on pairs, so it must be even")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads is {config.num_key_value_heads}; latent attention expands a key for each of the "
            f"{config.num_attention_heads} heads, so both must be equal"
        )
    if config.qk_norm:
        raise ValueError("qk_norm does not apply to latent attention, whose latents are normalised already")
    if config.norm_placement == "after":
        raise ValueError("norm_placement 'after' is defined for mha, gqa and mqa alone")


def _check_plain_attention(config: ModelConfig) -> None:
    for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} belongs to latent attention; set kv_lora_rank too, or leave {name} out")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads is {config.num_key_value_heads}; it must divide num_attention_heads "
            f"({config.num_attention_heads})"
        )
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size is {config.hidden_size}; num_attention_heads ({config.num_attention_heads}) must divide it, "
            "or head_dim must be given"
        )
    if config.query_head_dim % 2:
        raise ValueError(f"head_dim is {config.query_head_dim}; rotation works on pairs, so it must be even")


def _check_experts(config: ModelConfig) -> None:
    experts, groups, kept, chosen = (
        config.n_routed_experts,
        config.n_group,
        config.topk_group,
        config.num_experts_per_tok,
    )
    if config.moe_intermediate_size is None:
        raise ValueError("moe_intermediate_size is required when n_routed_experts is set")
    if experts % groups:
        raise ValueError(f"n_routed_experts is {experts}; n_group ({groups}) must divide it")
    if kept > groups:
        raise ValueError(f"topk_group is {kept}; it can be at most n_group ({groups})")
    if config.topk_method == "greedy" and groups > 1 and kept < groups:
        raise ValueError(f"topk_method 'greedy' ignores groups, but topk_group {kept} of {groups} asks for a limit")
    if config.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
        raise ValueError(
            f"n_group {groups} leaves {experts // groups} expert in a group; a group is scored by its two best, "
            "so at least 2 are needed"
        )
    if chosen > kept * (experts // groups):
        raise ValueError(
            f"num_experts_per_tok is {chosen}, but {kept} kept groups of {experts // groups} experts "
            f"offer only {kept * (experts // groups)}"
        )

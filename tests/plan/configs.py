"""Small models of every kind that the planner's tests share, and a strategy that draws more."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from benthic.config import ModelConfig

drawn = settings(max_examples=40, deadline=None, derandomize=True)

LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
BASE = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SMALL: dict[str, ModelConfig] = {
    "v3": ModelConfig(**BASE, **LATENT, **EXPERTS, q_lora_rank=24, num_nextn_predict_layers=1),
    "v3 without query compression": ModelConfig(**BASE, **LATENT, **EXPERTS),
    "dense mha": ModelConfig(**BASE),
    "dense gqa with biases": ModelConfig(**(BASE | {"num_key_value_heads": 2}), qkv_bias=True, output_bias=True),
    "dense mqa, tied": ModelConfig(**(BASE | {"num_key_value_heads": 1}), tie_word_embeddings=True),
    "olmo2": ModelConfig(**BASE, qk_norm=True, norm_placement="after"),
    "experts with mha": ModelConfig(**BASE, **EXPERTS),
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Models of both attentions, dense or with experts, sizes small."""
    size = st.integers(1, 6)
    heads = draw(size)
    fields = {
        "vocab_size": 16 * draw(size),
        "hidden_size": 8 * draw(size),
        "intermediate_size": 8 * draw(size),
        "num_hidden_layers": draw(size),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 64,
    }
    if draw(st.booleans()):
        latent = {"kv_lora_rank": 8 * draw(size), "qk_nope_head_dim": 4 * draw(size)}
        fields |= latent | {"qk_rope_head_dim": 2 * draw(size), "v_head_dim": 4 * draw(size)}
        fields |= {"q_lora_rank": draw(st.sampled_from([None, 8, 16]))}
    else:
        fields |= {"head_dim": 4 * draw(size), "qk_norm": draw(st.booleans()), "qkv_bias": draw(st.booleans())}
    if draw(st.booleans()):
        experts = 2 * draw(size)
        fields |= {"n_routed_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
        fields |= {"moe_intermediate_size": 8 * draw(size), "n_shared_experts": draw(st.integers(0, 2))}
        fields |= {"first_k_dense_replace": draw(st.integers(0, 2))}
    return ModelConfig(
        **fields, num_nextn_predict_layers=draw(st.integers(0, 2)), tie_word_embeddings=draw(st.booleans())
    )

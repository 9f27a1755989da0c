"""Tiny configs of every attention kind and expert layout, and a model with weights that tell mistakes apart."""

from __future__ import annotations

import torch

from benthic.config import ModelConfig
from benthic.model import LanguageModel

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
EXPERTS = {"n_routed_experts": 8, "moe_intermediate_size": 10, "num_experts_per_tok": 3}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0}

CONFIGS: dict[str, dict] = {
    "v3": LATENT
    | EXPERTS
    | {"q_lora_rank": 9, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    "v3 of two predictions": LATENT | EXPERTS | {"num_nextn_predict_layers": 2, "n_shared_experts": 1},
    "dense latent with prediction": LATENT | {"num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "v2 with yarn": LATENT
    | EXPERTS
    | SOFTMAX
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    | {"rope_parameters": YARN | {"mscale_all_dim": 0.7}},
    "multi-head, every second layer of experts": EXPERTS | SOFTMAX | {"moe_layer_freq": 2, "n_shared_experts": 1},
    "gshard: top-2 of few": EXPERTS | SOFTMAX | {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "switch: top-1 of few": EXPERTS | SOFTMAX | {"n_routed_experts": 4, "num_experts_per_tok": 1},
    "all experts chosen": EXPERTS | {"num_experts_per_tok": 8, "num_key_value_heads": 1},
    "grouped-query with biases": {"num_key_value_heads": 2, "qkv_bias": True, "output_bias": True, "head_dim": 6},
    "norm after, with query-key norms": {"norm_placement": "after", "qk_norm": True, "num_key_value_heads": 2},
    "norm after, experts": EXPERTS | {"norm_placement": "after", "qk_norm": True, "rope_interleave": False},
    "multi-query with predictions": {"num_key_value_heads": 1, "num_nextn_predict_layers": 2},
}


def tiny(**changes: object) -> ModelConfig:
    """A config of three small layers."""
    values = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(values | changes))


def randomised(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose gains, biases and routing biases all differ, with logits of deviation near 1."""
    model, stream = LanguageModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=stream)
            if tensor.ndim == 1:
                tensor.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                tensor.copy_(noise * 1.2 * tensor.shape[-1] ** -0.5)
    return model


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids int64 [batch, length]."""
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))

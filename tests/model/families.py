"""Tiny models of every family, built by transformers with weights that make routing and attention matter."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
V3 = {**COMMON, **LATENT, **EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}
V2 = {**COMMON, **LATENT, **EXPERTS, "n_shared_experts": 2, "routed_scaling_factor": 1.7}


def _yarn(**changes: float) -> dict:
    values = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": values | {"beta_fast": 32.0, "beta_slow": 1.0} | changes}


def _plain(**changes: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | changes}


_GREEDY = {"topk_method": "greedy", "n_group": None, "topk_group": None}
_LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

FAMILIES: dict[str, tuple[str, dict]] = {
    "v3": ("DeepseekV3", V3 | _plain()),
    "v3 without query compression": ("DeepseekV3", V3 | _plain() | {"q_lora_rank": None}),
    "v3 of one group": ("DeepseekV3", V3 | _plain() | {"n_group": 1, "topk_group": 1}),
    "v3 without normalised weights": ("DeepseekV3", V3 | _plain() | {"norm_topk_prob": False}),
    "v3 with yarn": ("DeepseekV3", V3 | _yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3 with yarn and two mscales": ("DeepseekV3", V3 | _yarn(mscale=0.707, mscale_all_dim=1.3)),
    "v3 with yarn and no mscale": ("DeepseekV3", V3 | _yarn()),
    "v3 with yarn like Kimi": ("DeepseekV3", V3 | _yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0)),
    "v3 half-split": ("DeepseekV3", V3 | _plain() | {"rope_interleave": False}),
    "v3 with biases": ("DeepseekV3", V3 | _plain() | {"attention_bias": True}),
    "v3 with coarse epsilon": ("DeepseekV3", V3 | _plain() | {"rms_norm_eps": 1e-2}),
    "v3 tied": ("DeepseekV3", V3 | _plain() | {"tie_word_embeddings": True}),
    "v2 greedy": ("DeepseekV2", V2 | _plain() | _GREEDY),
    "v2 lite": ("DeepseekV2", V2 | _yarn(mscale=0.707, mscale_all_dim=0.707) | _GREEDY | {"q_lora_rank": None}),
    "v2 group-limited": ("DeepseekV2", V2 | _yarn(mscale=0.707, mscale_all_dim=0.707) | _LIMITED),
    "olmo2": ("Olmo2", COMMON | _plain()),
    "olmo2 grouped": ("Olmo2", COMMON | _plain() | {"num_key_value_heads": 2}),
    "llama grouped": ("Llama", COMMON | _plain() | {"num_key_value_heads": 2}),
    "llama of one key": ("Llama", COMMON | _plain() | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama 3.1": (
        "Llama",
        COMMON | _plain(**_LLAMA3, original_max_position_embeddings=64) | {"num_key_value_heads": 2},
    ),
    "llama tied": ("Llama", COMMON | _plain() | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", COMMON | _plain() | {"num_key_value_heads": 2}),
}


def oracle(name: str) -> transformers.PreTrainedModel:
    """A transformers model of FAMILIES with random gains and routing biases; its logits have a deviation near 1."""
    kind, values = FAMILIES[name]
    config = getattr(transformers, kind + "Config")(**values)
    model = getattr(transformers, kind + "ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    stream = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if path.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=stream)
            if path.endswith("e_score_correction_bias"):
                tensor.copy_(0.3 * noise)
            elif path.endswith(".bias"):
                tensor.copy_(0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * 1.2 * tensor.shape[-1] ** -0.5)
    return model

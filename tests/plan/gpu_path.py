"""The path a GPU takes, on a processor, for tests that count what autograd keeps.

CPU kernels keep other tensors than CUDA's: the norm is composed of float32 steps and attention keeps its weights. Here
both are replaced by functions that keep what CUDA's keep (norm: input and 1 / rms; attention: query, key, value,
output, logsumexp) and compute nothing, and experts take the grouped path.
"""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.ops import experts as experts_module


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight, x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.full_like(x, 0.01, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight), None


def _add_norm(residual, x, weight, eps):
    total = residual + x
    return total, _Norm.apply(total, weight, eps)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def take_gpu_path(patch: pytest.MonkeyPatch) -> None:
    """Replace the operations whose kernels differ."""
    patch.setattr(ops, "rms_norm", _Norm.apply)
    patch.setattr(ops, "add_rms_norm", _add_norm)
    patch.setattr(ops, "attention", lambda query, key, value, scale, mask=None: _Attention.apply(query, key, value))
    patch.setattr(ops, "routed_experts", experts_module._grouped)


LATENT = dict(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
PLAIN = dict(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SHAPES = {
    "latent": LATENT,
    "latent with prediction": LATENT | dict(num_nextn_predict_layers=1, routed_scaling_factor=2.5),
    "latent without query compression": LATENT | dict(q_lora_rank=None, n_shared_experts=2),
    "norm after, experts": PLAIN
    | dict(norm_placement="after", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96),
    "softmax routing, unnormalised": LATENT
    | dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=4.0),
    "latent, halves rotated": LATENT | dict(rope_interleave=False),
    "grouped queries, halves rotated": PLAIN | dict(rope_interleave=False, qkv_bias=True),
    "two groups, wide": LATENT | dict(n_group=2, topk_group=1, hidden_size=256, num_hidden_layers=2),
    "grouped queries": PLAIN,
    "all heads, norm after, query-key norms": PLAIN
    | dict(num_key_value_heads=4, norm_placement="after", qk_norm=True, rope_interleave=False),
    "all heads with experts": PLAIN
    | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96),
}

"""The list of kept tensors against autograd's own, on real models.

CPU kernels keep other tensors than CUDA's: the norm is composed of float32 steps and attention keeps its weights. Here both are
replaced by functions that keep what CUDA's keep (norm: input and 1 / rms; attention: query, key, value, output,
logsumexp), and experts take the path of a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.config import ModelConfig
from benthic.model import LanguageModel, initialise
from benthic.ops import experts as experts_module
from benthic.ops import linear_cross_entropy
from benthic.plan.activations import layer_activations, prediction_activations

LENGTH, SEQUENCES = 48, 2
TOKENS = LENGTH * SEQUENCES


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).type_as(x) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return grad.clone().view_as(x), torch.zeros_like(weight), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        logsumexp = torch.zeros(query.shape[:-1])
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(ops, "rms_norm", _Norm.apply)
    monkeypatch.setattr(ops, "attention", lambda q, k, v, scale, mask=None: _Attention.apply(q, k, v))
    monkeypatch.setattr(ops, "routed_experts", experts_module._grouped)


def kept_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of distinct storages that the backward of a loss over `config` needs, parameters left out."""
    model = LanguageModel(config, dtype=dtype)
    initialise(model, seed=0)
    ids = torch.randint(config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    storages = {}
    depths = config.num_nextn_predict_layers

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.states(ids, num_predictions=depths)
        loss, _ = linear_cross_entropy(states.hidden.flatten(0, 1), model.head_weight, ids.flatten())
        for hidden in states.predictions:
            loss = (
                loss
                + linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, ids[:, : hidden.shape[1]].flatten())[0]
            )
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    rotations = model._rotations.rows(0, LENGTH, ids.device).untyped_storage().data_ptr()
    return sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in storages.items()
        if pointer not in fixed and pointer != rotations
    )


def predicted_bytes(config: ModelConfig, dtype: torch.dtype) -> float:
    precision, size = ("bf16", 2) if dtype == torch.bfloat16 else ("fp32", 4)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    per_token = 8.0 + config.hidden_size * size + 4
    for layer in range(layers):
        per_token += sum(one.bytes for one in layer_activations(config, layer, precision, "none"))
        if layer >= config.num_hidden_layers:
            per_token += sum(one.bytes for one in prediction_activations(config, precision, "none"))
    heads = 1 + config.num_nextn_predict_layers
    loss = heads * size * (config.hidden_size * TOKENS + config.vocab_size * config.hidden_size)
    expert_layers = sum(config.is_expert_layer(layer) for layer in range(layers))
    router = expert_layers * 4 * (config.n_routed_experts or 0) * config.hidden_size * (size == 2)
    return TOKENS * per_token + loss + router


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
SMALL = {
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", SMALL)
def test_kept_tensors_are_those_autograd_keeps(name, dtype, as_on_gpu):
    config = ModelConfig(**SMALL[name])
    assert predicted_bytes(config, dtype) == pytest.approx(kept_bytes(config, dtype), rel=0.01)

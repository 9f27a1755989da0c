"""Small models and folders that the checkpoint tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benthic.config import ModelConfig
from benthic.config.manifest import parameters

# kv_a_proj_with_mqa has 144 rows and the width is 160: both ragged in blocks of 128.
TINY = ModelConfig(
    vocab_size=61,
    hidden_size=160,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    kv_lora_rank=136,
    q_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
    dtype="float32",
)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as the manifest states it; routing biases near 5, where bfloat16 would round them."""
    stream = torch.Generator().manual_seed(seed)
    tensors = {row.name: torch.randn(row.shape, generator=stream) for row in parameters(config)}
    return {name: tensor + 5 * name.endswith("e_score_correction_bias") for name, tensor in tensors.items()}


class Bag(torch.nn.Module):
    """A module that holds a manifest's tensors, unfilled, and computes nothing."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for row in parameters(config):
            *path, last = row.name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            if row.dtype == "float32":
                module.register_buffer(last, torch.full(row.shape, torch.nan))
            else:
                module.register_parameter(last, torch.nn.Parameter(torch.full(row.shape, torch.nan, dtype=dtype)))


def rewrite_header(path: Path, change) -> None:
    """Apply `change` to the JSON header of a safetensors file in place."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

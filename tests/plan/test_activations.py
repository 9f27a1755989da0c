"""The list of kept tensors against autograd's own, on real models."""

from __future__ import annotations

import pytest
import torch

from benthic.config import ModelConfig
from benthic.model import LanguageModel, initialise
from benthic.ops import linear_cross_entropy
from benthic.plan.activations import layer_activations
from tests.plan.gpu_path import SHAPES, take_gpu_path

LENGTH, SEQUENCES = 48, 2
TOKENS = LENGTH * SEQUENCES


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
    heads = 1 + config.num_nextn_predict_layers
    loss = heads * size * (config.hidden_size * TOKENS + config.vocab_size * config.hidden_size)
    expert_layers = sum(config.is_expert_layer(layer) for layer in range(layers))
    router = expert_layers * 4 * (config.n_routed_experts or 0) * config.hidden_size * (size == 2)
    return TOKENS * per_token + loss + router


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_kept_tensors_are_those_autograd_keeps(name, dtype, monkeypatch):
    take_gpu_path(monkeypatch)
    config = ModelConfig(**SHAPES[name])
    assert predicted_bytes(config, dtype) == pytest.approx(kept_bytes(config, dtype), rel=0.01)

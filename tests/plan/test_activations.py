"""The list of kept tensors against autograd's own, on real models."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benthic.config import ModelConfig
from benthic.model import LanguageModel, initialise
from benthic.model.float8 import use_float8
from benthic.ops.recomputation import _Memory, _View
from benthic.plan.activations import element_bytes, layer_activations
from benthic.plan.training import TrainingPrecision
from benthic.train.recomputation import recompute
from tests.plan.gpu_path import SHAPES, take_gpu_path

LENGTH, SEQUENCES = 48, 2
TOKENS = LENGTH * SEQUENCES
PRECISIONS: tuple[TrainingPrecision, ...] = ("bf16", "fp8", "fp32")


def kept_bytes(config: ModelConfig, precision: TrainingPrecision, recomputation: str) -> int:
    """Bytes of distinct storages that the states of `config` keep for their backward, parameters left out."""
    model = LanguageModel(config, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    initialise(model, seed=0)
    if precision == "fp8":
        use_float8(model)
    recompute(model, recomputation)
    ids = torch.randint(config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real = _Memory.pack

    def pack_or_drop(memory: _Memory, tensor: torch.Tensor) -> object:
        kept = real(memory, tensor)
        return kept if isinstance(kept, _View) else pack(kept)

    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr(_Memory, "pack", pack_or_drop)
        states = model.states(ids, num_predictions=config.num_nextn_predict_layers)
    # What nobody else holds is freed, and its address may be another's: sizes are those of what is kept to the end.
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    fixed.add(model._rotations.rows(0, LENGTH, ids.device).untyped_storage().data_ptr())
    del states
    return sum(one.untyped_storage().nbytes() for pointer, one in storages.items() if pointer not in fixed)


def predicted_bytes(config: ModelConfig, precision: TrainingPrecision, recomputation: str) -> float:
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    # Token numbers, and the final norm's input.
    per_token = 8.0 + config.hidden_size * element_bytes(precision) + 4
    for layer in layers:
        per_token += sum(one.bytes for one in layer_activations(config, layer, precision, recomputation))
    return TOKENS * per_token


@pytest.mark.parametrize("recomputation", ["none", "up_projections", "layer"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_kept_tensors_are_those_autograd_keeps(name, precision, recomputation, monkeypatch):
    take_gpu_path(monkeypatch)
    config = ModelConfig(**SHAPES[name])
    kept = kept_bytes(config, precision, recomputation)
    assert predicted_bytes(config, precision, recomputation) == pytest.approx(kept, rel=0.01)

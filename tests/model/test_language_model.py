"""Names, shapes, input checks, prediction layers, packed documents."""

from __future__ import annotations

import pytest
import torch

from benthic.config import ModelConfig
from benthic.config.manifest import parameters
from benthic.config.published import preset_names
from benthic.model import LanguageModel


@pytest.mark.parametrize("preset", preset_names())
def test_manifest_states_every_tensor_of_the_model(preset):
    config = ModelConfig.from_pretrained(preset)
    model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stated = {
        row.name: (row.shape, torch.float32 if row.dtype == "float32" else torch.bfloat16) for row in parameters(config)
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == stated
    assert list(model.state_dict()) and set(model.state_dict()) == set(stated)

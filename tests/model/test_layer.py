"""A layer on a GPU, where kernels assemble the heads and fuse the norms, equals the same layer on the processor."""

from __future__ import annotations

import copy

import pytest
import torch

from benthic import ops
from benthic.model.attention import Span
from tests.model.configs import CONFIGS, randomised, tiny

DENSE = [name for name, changes in CONFIGS.items() if not tiny(**changes).is_expert_layer(0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the processor")
@pytest.mark.parametrize("name", DENSE)
def test_a_layer_and_its_gradients_are_those_of_the_processor(name):
    config = tiny(**CONFIGS[name])
    layer = randomised(config).model.layers[0]
    hidden = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        moved, x = copy.deepcopy(layer).to(device), hidden.to(device).requires_grad_()
        out, _ = moved(x, Span(ops.RotaryTable(config).rows(0, 7, torch.device(device))))
        grads = torch.autograd.grad(out.square().sum(), [x, *moved.parameters()])
        found.append([y.cpu() for y in (out, *grads)])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6

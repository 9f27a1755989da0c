"""Heads out of latent attention's projections equal the reference, values and gradients."""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import latent_heads as reference
from tests.ops.test_ops import noise

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("own", [5, 8])
def test_heads_equal_the_reference(own, interleaved, device):
    angles = noise(5, 3, seed=7).to(device)
    rotations = torch.polar(torch.ones_like(angles), angles)
    leaves = [noise(2, 5, 3, own + 6), noise(2, 5, 3, own + 7, seed=1), noise(2, 5, 9 + 6, seed=2)]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    directions = [noise(2, 5, 3, width, seed=4).to(device) for width in (own + 6, own + 6, 7)]
    results = []
    for function in (ops.latent_heads, reference.latent_heads):
        query, expanded, wide = leaves
        heads = function(query, expanded, wide[..., 9:], rotations, interleaved)
        results.append([*heads, *torch.autograd.grad(heads, leaves, directions)])
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_close(ours, theirs, "gradient_fp32", f"result or gradient {index}")


def test_values_stay_where_they_are():
    query, expanded, key = noise(1, 2, 3, 8), noise(1, 2, 3, 10), noise(1, 2, 4)
    rotations = torch.ones(2, 2, dtype=torch.complex64)
    assert ops.latent_heads(query, expanded, key, rotations, True)[2].data_ptr() == expanded[..., 4:].data_ptr()

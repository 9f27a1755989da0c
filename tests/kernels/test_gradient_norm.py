"""The norms of many gradients equal torch's in float64, whatever sizes and dtypes, and show what is not finite."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="comes with CUDA builds of torch")
kernels = import_module("benthic.kernels.gradient_norm")
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(3, 5), (1,), (0,), (kernels.BLOCK * kernels.TURNS,), (kernels.BLOCK * kernels.TURNS + 1,), (7, 4096)]


def gradients(device, dtypes=(torch.float32, torch.bfloat16)):
    stream = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=stream) for shape in SHAPES]
    return [one.to(dtypes[i % len(dtypes)]).to(device) for i, one in enumerate(made)]


def test_they_are_the_norms_of_all_elements(device):
    found = kernels.gradient_norms(gradients(device))
    expected = [one.double().norm().item() for one in gradients(device)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_they_are_the_same_each_time(device):
    assert torch.equal(kernels.gradient_norms(gradients(device)), kernels.gradient_norms(gradients(device)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("which", [0, 4])
def test_one_value_that_is_not_finite_shows_where_it_is(value, place, which, device):
    made = gradients(device)
    made[which].view(-1)[place] = value
    finite = kernels.gradient_norms(made).isfinite().tolist()
    assert finite == [index != which for index in range(len(made))]


def test_strided_gradients_are_refused(device):
    with pytest.raises(ValueError, match="gradients must be contiguous, not of strides"):
        kernels.gradient_norms([torch.ones(3, 4, device=device).t()])

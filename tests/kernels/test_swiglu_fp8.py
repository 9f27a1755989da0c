"""The fused activation equals the reference, and the reference equals autograd's gradient of the plain formula."""

import pytest
import torch

from benthic.numerics.reference import swiglu_fp8 as reference
from benthic.numerics.reference.quantise import dequantise_rows
from tests.kernels.conftest import HOPPER

kernels = pytest.importorskip("benthic.kernels.swiglu_fp8", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 16), (17, 128), (33, 272), (20, 384)]


def case(rows: int, channels: int, weighted: bool, device: str):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 2 * channels, generator=generator) * 3
    hidden[rows // 2] = 0
    gradient = torch.randn(rows, channels, generator=generator)
    weights = torch.rand(rows, generator=generator).to(device) if weighted else None
    return hidden.bfloat16().to(device), gradient.bfloat16().to(device), weights


def assert_close(values, scales, expected_values, expected_scales):
    """A unit of e4m3 apart at most: exp is not the same everywhere, so nor are ties, or a maximum's power of two."""
    assert (scales != expected_scales).float().mean() <= 0.01
    found, expected = dequantise_rows(values, scales), dequantise_rows(expected_values, expected_scales)
    if HOPPER:
        assert (found != expected).float().mean() <= 0.02
    else:
        # Triton's interpreter (3.6) loses the carry of a mantissa that rounds up, and cuts subnormals.
        bits = expected_values.view(torch.uint8)
        trusted = ((bits & 0x07) != 0) & ((bits & 0x78) != 0)
        found, expected = found * trusted, expected * trusted
    torch.testing.assert_close(found, expected, rtol=0.13, atol=2**-9 * float(expected_scales.max()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(shape, weighted, device):
    hidden, _, weights = case(*shape, weighted, device)
    values, scales, kept, kept_scales = kernels.swiglu_quantised(hidden, weights)
    wanted = reference.swiglu_quantised(hidden, weights)
    assert_close(values, scales, *wanted[:2])
    for half in (0, 1):
        found = kept.chunk(2, 1)[half].contiguous(), kept_scales.chunk(2)[half]
        assert_close(*found, wanted[2].chunk(2, 1)[half].contiguous(), wanted[3].chunk(2)[half])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_reference(shape, weighted, device):
    hidden, gradient, weights = case(*shape, weighted, device)
    _, _, kept, kept_scales = reference.swiglu_quantised(hidden, weights)
    found = kernels.swiglu_gradient_quantised(gradient, kept, kept_scales, weights)
    wanted = reference.swiglu_gradient_quantised(gradient, kept, kept_scales, weights)
    assert_close(*found[:2], *wanted[:2])
    assert_close(*found[2:4], *wanted[2:4])
    if weighted:
        torch.testing.assert_close(found[4], wanted[4], rtol=1e-4, atol=1e-3)
    else:
        assert found[4] is None


def test_no_tokens_are_fine(device):
    values, _, kept, kept_scales = kernels.swiglu_quantised(torch.zeros(0, 256, device=device).bfloat16(), None)
    assert values.shape == (0, 128)
    hidden, *_ = kernels.swiglu_gradient_quantised(
        torch.zeros(0, 128, device=device).bfloat16(), kept, kept_scales, None
    )
    assert hidden.shape == (0, 256)


def test_the_reference_is_the_gradient_of_the_formula():
    hidden, gradient, weights = case(9, 128, True, "cpu")
    _, _, kept, kept_scales = reference.swiglu_quantised(hidden, weights)
    halves = zip(kept.chunk(2, 1), kept_scales.chunk(2), strict=True)
    gate, up = (dequantise_rows(values, scales).requires_grad_() for values, scales in halves)
    weights.requires_grad_()
    active = torch.nn.functional.silu(gate) * up * weights[:, None]
    active.backward(gradient.float())
    found = reference.swiglu_gradient(gradient, kept, kept_scales, weights.detach())
    torch.testing.assert_close(found[0], torch.cat((gate.grad, up.grad), 1))
    torch.testing.assert_close(found[1], active.detach())
    torch.testing.assert_close(found[2], weights.grad)


def test_weights_of_another_length_are_refused(device):
    with pytest.raises(ValueError, match=r"weights must be float32 \[4\]"):
        kernels.swiglu_quantised(torch.zeros(4, 32, device=device).bfloat16(), torch.ones(3, device=device))

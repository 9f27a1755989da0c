"""The gated activation and its gradient against plain torch in float32, for odd sizes and strided operands."""

import pytest
import torch

from benthic.numerics.reference import swiglu as reference

kernels = pytest.importorskip("benthic.kernels.swiglu", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(device, dtype)


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[theirs.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 13), (17, 128), (5, 300)])
def test_separate_gate_and_up(shape, dtype, device):
    gate, up, grad = (noise(*shape, device=device, dtype=dtype, seed=seed) for seed in range(3))
    expected = reference.swiglu(gate.float(), up.float()).to(dtype)
    assert_same([kernels.swiglu(gate, up)], [expected])
    assert_same(kernels.swiglu_backward(grad, gate, up), reference.swiglu_backward(grad, gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (19, 13), (9, 128), (5, 300)])
def test_joined_gate_and_up_with_routing_weights(rows, width, weighted, dtype, device):
    hidden, grad = (noise(rows, n * width, device=device, dtype=dtype, seed=n) for n in (2, 1))
    weights = noise(rows, device=device) if weighted else None
    assert_same([kernels.weighted_swiglu(hidden, weights)], [reference.weighted_swiglu(hidden, weights)])
    actual = kernels.weighted_swiglu_backward(grad, hidden, weights)
    expected = reference.weighted_swiglu_backward(grad, hidden, weights)
    assert_same(actual[::2], expected[::2])
    assert torch.equal(actual[2], kernels.weighted_swiglu(hidden, weights))
    if weighted:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
    else:
        assert actual[1] is expected[1] is None


def test_the_reference_gradient_is_autograds():
    hidden, weights = noise(4, 10, device="cpu").requires_grad_(), noise(4, device="cpu").requires_grad_()
    grad = noise(4, 5, device="cpu")
    out = reference.weighted_swiglu(hidden, weights)
    assert_same(
        reference.weighted_swiglu_backward(grad, hidden, weights)[:2], torch.autograd.grad(out, [hidden, weights], grad)
    )


def test_halves_of_joined_rows_and_an_expanded_gradient_need_no_copy_by_the_caller(device):
    hidden = noise(6, 40, device=device)
    gate, up = hidden.chunk(2, -1)
    grad = torch.ones(1, 1, device=device).expand(6, 20)
    assert_same([kernels.swiglu(gate, up)], [reference.swiglu(gate, up)])
    assert_same(kernels.swiglu_backward(grad, gate, up), reference.swiglu_backward(grad, gate, up))


def test_large_values_saturate_and_do_not_overflow(device):
    gate = torch.tensor([[-80.0, -30.0, 0.0, 30.0, 80.0]], device=device)
    assert_same([kernels.swiglu(gate, torch.ones_like(gate))], [torch.tensor([[0.0, 0, 0, 30, 80]], device=device)])


def test_nothing_is_fine(device):
    assert kernels.swiglu(*torch.zeros(2, 0, 8, device=device)).shape == (0, 8)
    grad_hidden, grad_weights, out = kernels.weighted_swiglu_backward(
        torch.zeros(0, 4, device=device), torch.zeros(0, 8, device=device), torch.zeros(0, device=device)
    )
    assert (grad_hidden.shape, grad_weights.shape, out.shape) == ((0, 8), (0,), (0, 4))

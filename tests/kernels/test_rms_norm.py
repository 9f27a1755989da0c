"""Normalised rows and every gradient equal the reference's in float64, whatever the width and the strides."""

import pytest
import torch

from benthic import ops
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import norm as reference

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1), (3, 7), (5, 128), (70, 33), (130, 512), (9, 2048), (3, 7168), (2, 16384)]
KINDS = {torch.float32: ("operation_fp32", "gradient_fp32"), torch.bfloat16: ("operation_bf16", "operation_bf16")}


def noise(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(function, inputs: list[torch.Tensor], directions: list[torch.Tensor]):
    """Results for `inputs`, and gradients of the results' products with `directions`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    return found, torch.autograd.grad(found, leaves, [d.to(found[0].dtype) for d in directions])


def compare(ours, theirs, inputs: list[torch.Tensor], directions: list[torch.Tensor]) -> None:
    results, grads = gradients(ours, inputs, directions)
    expected, expected_grads = gradients(theirs, [x.double() for x in inputs], directions)
    kind, gradient_kind = KINDS[inputs[0].dtype]
    for index, (found, wanted) in enumerate(zip(results, expected, strict=True)):
        assert found.dtype == inputs[0].dtype
        assert_close(found, wanted, kind, f"result {index}")
    for index, (found, wanted) in enumerate(zip(grads, expected_grads, strict=True)):
        # A sum of many rounded terms: its error goes with the largest of them, not with itself.
        size = max(1.0, float(wanted.abs().max()))
        assert_close(found / size, wanted / size, gradient_kind, f"gradient {index}")


def apply(x, weight):
    return ops.norm._KernelRMSNorm.apply(x, weight, 1e-3)


def apply_to_sum(residual, x, weight):
    return ops.norm._KernelAddRMSNorm.apply(residual, x, weight, 1e-3)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_width(shape, dtype, device):
    x, grad = (noise(*shape, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = 1 + noise(shape[1], device=device, dtype=dtype, seed=2) / 4
    compare(apply, lambda x, w: reference.rms_norm(x, w, 1e-3), [x, weight], [grad])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_and_its_norm_have_one_gradient(shape, dtype, device):
    residual, x, grad_total, grad = (noise(*shape, device=device, dtype=dtype, seed=seed) for seed in range(4))
    weight = 1 + noise(shape[1], device=device, dtype=dtype, seed=5) / 4
    compare(
        apply_to_sum,
        lambda r, x, w: reference.add_rms_norm(r, x, w, 1e-3),
        [residual, x, weight],
        [grad_total, grad],
    )


def test_only_one_of_the_two_results_may_be_used(device):
    residual, x = (noise(4, 24, device=device, dtype=torch.float32, seed=seed) for seed in (0, 1))
    weight = noise(24, device=device, dtype=torch.float32, seed=2)
    for place in (0, 1):
        compare(
            lambda r, x, w, place=place: (apply_to_sum(r, x, w)[place], (r + x + w).sum()),
            lambda r, x, w, place=place: (reference.add_rms_norm(r, x, w, 1e-3)[place], (r + x + w).sum()),
            [residual, x, weight],
            [noise(4, 24, device=device, dtype=torch.float32, seed=3), torch.ones((), device=device)],
        )


def test_a_slice_of_wider_rows_is_read_in_place(device):
    rows = noise(3, 5, 40, device=device, dtype=torch.float32)
    weight, grad = noise(24, device=device, dtype=torch.float32), noise(3, 5, 24, device=device, dtype=torch.float32)
    compare(
        lambda r, w: apply(r[..., 8:32], w),
        lambda r, w: reference.rms_norm(r[..., 8:32], w, 1e-3),
        [rows, weight],
        [grad],
    )


def test_a_gradient_without_strides_is_taken(device):
    x = noise(6, 12, device=device, dtype=torch.float32).requires_grad_()
    weight = noise(12, device=device, dtype=torch.float32, seed=1)
    apply(x, weight).sum().backward()
    expected = torch.autograd.grad(reference.rms_norm(x, weight, 1e-3).sum(), x)[0]
    assert_close(x.grad, expected, "gradient_fp32")


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_have_no_result_and_no_gradient(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    apply(x, weight).sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


def test_zeros_stay_zeros(device):
    x = torch.zeros(3, 16, device=device, requires_grad=True)
    out = apply(x, torch.ones(16, device=device))
    out.sum().backward()
    assert not out.any()
    assert torch.isfinite(x.grad).all()


def test_the_weight_may_be_of_another_type(device):
    x = noise(4, 16, device=device, dtype=torch.bfloat16)
    weight = noise(16, device=device, dtype=torch.float32, seed=1).requires_grad_()
    out = apply(x, weight)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert_close(out, reference.rms_norm(x.double(), weight.double(), 1e-3), "operation_bf16")


def test_gradients_are_the_same_on_every_run(device):
    x, grad = (noise(200, 48, device=device, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = noise(48, device=device, dtype=torch.bfloat16, seed=2)
    first = gradients(apply, [x, weight], [grad])[1]
    for _ in range(3):
        assert all(map(torch.equal, gradients(apply, [x, weight], [grad])[1], first))

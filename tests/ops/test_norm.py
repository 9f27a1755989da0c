"""The norm of a sum is the plain composition on a processor, and equals the reference."""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import norm as reference
from tests.ops.test_ops import noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_of_a_sum_is_the_composition_bit_for_bit(dtype):
    residual, x, weight = (noise(*shape, seed=len(shape)).to(dtype) for shape in ((2, 3, 24), (2, 3, 24), (24,)))
    total, normed = ops.add_rms_norm(residual, x, weight, 1e-6)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ops.rms_norm(residual + x, weight, 1e-6))


def test_both_results_carry_gradients():
    leaves = [noise(2, 3, 24, seed=seed).requires_grad_() for seed in (0, 1)] + [noise(24).requires_grad_()]
    directions = [noise(2, 3, 24, seed=seed) for seed in (2, 3)]
    found = torch.autograd.grad(ops.add_rms_norm(*leaves, 1e-3), leaves, directions)
    expected = torch.autograd.grad(reference.add_rms_norm(*leaves, 1e-3), leaves, directions)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs, "gradient_fp32", f"gradient {index}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has kernels to leave")
def test_rows_that_no_program_holds_and_float64_still_work_on_a_gpu():
    for shape, dtype in (((2, 16385), torch.float32), ((2, 24), torch.float64)):
        x, weight = noise(*shape).to("cuda", dtype), noise(shape[1], seed=1).to("cuda", dtype)
        assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), "operation_fp32")

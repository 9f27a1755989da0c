"""The one-pass AdamW equals the reference: dtypes, clipping, odd sizes; nothing changes where not finite."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference import adamw as reference

pytest.importorskip("triton", reason="comes with CUDA builds of torch")
kernels = import_module("benthic.kernels.adamw")
FLOATS = (torch.float32, torch.bfloat16)
RULE = reference.Rule(learning_rate=0.01, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, updates=3)


def state(shape, gradient_dtype, moment_dtype, parameter_dtype, device):
    stream = torch.Generator().manual_seed(0)
    master, gradient, first, second = (torch.randn(shape, generator=stream) for _ in range(4))
    second = second.square()
    parameter = None if parameter_dtype is None else master.to(parameter_dtype)
    tensors = master, gradient.to(gradient_dtype), first.to(moment_dtype), second.to(moment_dtype), parameter
    return [None if one is None else one.to(device) for one in tensors]


@pytest.mark.parametrize("shape", [(3, 5), (1,), (2048,), (3, 7, 311)])
@pytest.mark.parametrize(
    ("gradient", "moments", "parameter"),
    [*product(FLOATS, FLOATS, (None, *FLOATS))],
)
def test_an_update_equals_the_reference(shape, gradient, moments, parameter, device):
    ours, theirs = (state(shape, gradient, moments, parameter, device) for _ in range(2))
    clip, finite = torch.tensor(0.37, device=device), torch.tensor(True, device=device)
    kernels.adamw(*ours, RULE, clip, finite)
    reference.adamw(*theirs, RULE, clip, finite)
    for name, a, b in zip(("master", "gradient", "exp_avg", "exp_avg_sq", "parameter"), ours, theirs, strict=True):
        if a is not None:
            assert_close(a, b, "operation_fp32" if a.dtype == torch.float32 else "operation_bf16", name)


def test_nothing_changes_unless_the_gradient_is_finite(device):
    tensors = state((5, 700), torch.bfloat16, torch.bfloat16, torch.bfloat16, device)
    tensors[1].fill_(float("nan"))
    before = [one.clone() for one in tensors]
    kernels.adamw(*tensors, RULE, torch.tensor(1.0, device=device), torch.tensor(False, device=device))
    for index in (0, 2, 3, 4):
        assert torch.equal(tensors[index], before[index])


def test_a_strided_gradient_is_refused(device):
    tensors = state((6, 6), torch.float32, torch.float32, None, device)
    tensors[1] = tensors[1].t()
    with pytest.raises(ValueError, match=r"gradient must be contiguous \[6, 6\]"):
        kernels.adamw(*tensors, RULE, torch.tensor(1.0, device=device), torch.tensor(True, device=device))


def test_an_empty_parameter_is_fine(device):
    tensors = state((0, 6), torch.float32, torch.float32, None, device)
    kernels.adamw(*tensors, RULE, torch.tensor(1.0, device=device), torch.tensor(True, device=device))

"""Root-mean-square normalisation (arXiv:1910.07467). Reference: numerics/reference/norm.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.recomputation import cheap, remember

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNEL_WIDTH = 16384
"""The longest row that a program's registers hold."""


@cheap
def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*tokens width"]:
    """x / rms(x) * weight over the last dimension; computed in float32, returned in x's dtype."""
    if _has_kernel(x):
        return _KernelRMSNorm.apply(x, weight, eps)
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        # torch has no fused kernel for the processor, forwards or backwards: chains of small operations.
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, eps)
        if x.numel() == x.shape[-1]:
            return x * (float(torch.linalg.vector_norm(x)) ** 2 / x.shape[-1] + eps) ** -0.5 * weight
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    residual: Float[Tensor, "*tokens width"],
    x: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, " width"],
    eps: float,
) -> tuple[Float[Tensor, "*tokens width"], Float[Tensor, "*tokens width"]]:
    """The residual stream with `x` added, and the same through rms_norm: one pass over memory each way on a GPU."""
    if _has_kernel(x) and residual.dtype == x.dtype:
        total, normed = _KernelAddRMSNorm.apply(residual, x, weight, eps)
        remember(normed, rms_norm, total, weight, eps)
        return total, normed
    total = residual + x
    return total, rms_norm(total, weight, eps)


def _has_kernel(x: Tensor) -> bool:
    """Elsewhere (float64, longer rows) torch's own operations serve."""
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and x.shape[-1] <= _KERNEL_WIDTH


def _rows(x: Tensor) -> Tensor:
    """`x` as a matrix whose rows are contiguous; a copy only where no view is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _KernelRMSNorm(torch.autograd.Function):
    """The Triton kernels of benthic.kernels.rms_norm; keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from benthic.kernels import rms_norm as kernels

        rows = _rows(x)
        normed, inverse = kernels.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, inverse)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        from benthic.kernels import rms_norm as kernels

        (grad,) = grad_outputs
        grad_x, grad_weight = kernels.rms_norm_backward(_rows(grad), *ctx.saved_tensors)
        return grad_x.view(grad.shape), grad_weight, None


class _KernelAddRMSNorm(torch.autograd.Function):
    """As _KernelRMSNorm, of a sum that is itself a result; both summands have the same gradient."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from benthic.kernels import rms_norm as kernels

        total, normed, inverse = kernels.add_rms_norm(_rows(residual), _rows(x), weight, eps)
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight, inverse)
        return total, normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        from benthic.kernels import rms_norm as kernels

        grad_total, grad_normed = grad_outputs
        total, weight, inverse = ctx.saved_tensors
        grad, grad_weight = kernels.add_rms_norm_backward(
            _rows(grad_total), _rows(grad_normed), _rows(total), weight, inverse
        )
        grad = grad.view(total.shape)
        return grad, grad, grad_weight, None


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and h = r x: y = w h, dx = r (w dy - h mean(w dy h)), dw = sum dy h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        weighted = grad * weight
        along = torch.linalg.vecdot(weighted, unit).div_(x.shape[-1])[..., None]
        grad_x = torch.addcmul(weighted, unit, along, value=-1).mul_(inverse)
        return grad_x, unit.mul_(grad).view(-1, x.shape[-1]).sum(0), None

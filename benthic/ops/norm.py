"""Root-mean-square normalisation (arXiv:1910.07467). Reference: numerics/reference/norm.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*tokens width"]:
    """x / rms(x) * weight over the last dimension; computed in float32, returned in x's dtype."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        # torch has no fused kernel for the processor, forwards or backwards: chains of small operations.
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, eps)
        if x.numel() == x.shape[-1]:
            return x * (float(torch.linalg.vector_norm(x)) ** 2 / x.shape[-1] + eps) ** -0.5 * weight
    return F.rms_norm(x, weight.shape, weight, eps)


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

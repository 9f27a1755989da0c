"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*tokens width"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def add_rms_norm(
    residual: Float[Tensor, "*tokens width"],
    x: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, " width"],
    eps: float,
) -> tuple[Float[Tensor, "*tokens width"], Float[Tensor, "*tokens width"]]:
    """residual + x, and the same normalised."""
    total = residual + x
    return total, rms_norm(total, weight, eps)

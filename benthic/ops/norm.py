"""Root-mean-square normalisation (arXiv:1910.07467). Reference: numerics/reference/norm.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; computed in float32, returned in x's dtype."""
    return F.rms_norm(x, weight.shape, weight, eps)

"""Modules that hold one tensor. They allocate and leave it uninitialised: values come from a checkpoint or
`initialise`, and filling a large model twice costs minutes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from benthic import ops


class Linear(nn.Linear):
    """x @ weight.T (+ bias), weight [out, in]."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


class Embedding(nn.Module):
    """Rows of `weight` [V, D] by token id."""

    def __init__(self, rows: int, width: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))

    def forward(self, ids: Int64[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain `weight` [width]."""

    def __init__(self, width: int, eps: float, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return ops.rms_norm(x, self.weight, self.eps)

    def of_sum(
        self, residual: Float[Tensor, "*tokens width"], x: Float[Tensor, "*tokens width"]
    ) -> tuple[Float[Tensor, "*tokens width"], Float[Tensor, "*tokens width"]]:
        """residual + x, and the same normalised."""
        return ops.add_rms_norm(residual, x, self.weight, self.eps)

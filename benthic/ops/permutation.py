"""Tokens brought into the order of their experts, and back. Reference: numerics/reference/permutation.py.

Copying to rows and summing over choices are each other's transpose, so each is the other's backward, and neither adds
into memory that another writes: the same bits on every run. Nothing waits for the GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class Permutation(NamedTuple):
    """The T K choices of experts, sorted: the token of each row, the row of each choice, and the row where each
    expert's rows end. Within an expert rows are in the order of tokens."""

    tokens: Int64[Tensor, " rows"]
    places: Int64[Tensor, "tokens chosen"]
    ends: Int32[Tensor, " experts"]


def sort_by_expert(experts: Int64[Tensor, "tokens chosen"], num_experts: int) -> Permutation:
    """The stable order of choices by expert; the last of `ends` is T K, since every choice names an expert."""
    return Permutation(*_implementation(experts).sort_by_expert(experts, num_experts))


def take_rows(x: Float[Tensor, "tokens width"], permutation: Permutation) -> Float[Tensor, "rows width"]:
    """Each token's row, copied to the K places of its choices."""
    return _TakeRows.apply(x, permutation.places)


def sum_choices(
    rows: Float[Tensor, "rows width"],
    permutation: Permutation,
    residual: Float[Tensor, "tokens width"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """Each token's K rows, then its `residual`, summed in float32 in this order; in the dtype of `rows`."""
    return _SumChoices.apply(rows, permutation.places, residual)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _implementation(x).take_rows(x, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return _implementation(grad).sum_choices(grad, *ctx.saved_tensors), None


class _SumChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(places)
        return _implementation(rows).sum_choices(rows, places, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        needs_rows, _, needs_residual = ctx.needs_input_grad
        rows = _implementation(grad).take_rows(grad, *ctx.saved_tensors) if needs_rows else None
        return rows, None, grad if needs_residual else None


def _implementation(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from benthic.kernels import permutation
    else:
        from benthic.numerics.reference import permutation
    return permutation

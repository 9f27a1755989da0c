"""Tokens brought into the order of their experts, and back. Reference: numerics/reference/permutation.py.

Copying to rows and summing over choices are each other's transpose, so each is the other's backward, and neither adds
into memory that another writes: the same bits on every run. Nothing waits for the GPU.

A choice may be none: -1, and so is its place. How many are not is a number of the host, `count`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class Permutation(NamedTuple):
    """The choices of experts, T K if none is -1, sorted: the token of each row, the row of each choice, and the row
    where each expert's rows end. Within an expert rows are in the order of tokens."""

    tokens: Int64[Tensor, " rows"]
    places: Int64[Tensor, "tokens chosen"]
    ends: Int32[Tensor, " experts"]


def sort_by_expert(experts: Int64[Tensor, "tokens chosen"], num_experts: int, count: int | None = None) -> Permutation:
    """The stable order of choices by expert; the last of `ends` is `count`, the choices that name an expert.

    Without `count` there are T K rows. Where a choice is -1 those past the last end mean nothing: `first_rows` cuts
    them off when their number is known.
    """
    return Permutation(*_implementation(experts).sort_by_expert(experts, num_experts, count))


def first_rows(permutation: Permutation, count: int) -> Permutation:
    """What sort_by_expert gives with `count`."""
    return permutation._replace(tokens=permutation.tokens[:count])


def take_rows(x: Float[Tensor, "tokens width"], permutation: Permutation) -> Float[Tensor, "rows width"]:
    """Each token's row, copied to the K places of its choices."""
    return _TakeRows.apply(x, permutation.places, len(permutation.tokens))


def sum_choices(
    rows: Float[Tensor, "rows width"],
    permutation: Permutation,
    residual: Float[Tensor, "tokens width"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """Each token's K rows, then its `residual`, summed in float32 in this order; in the dtype of `rows`."""
    return _SumChoices.apply(rows, permutation.places, residual)


def by_row(values: Float[Tensor, "tokens chosen"], permutation: Permutation) -> Float[Tensor, " rows"]:
    """Each choice's number at the row of that choice."""
    count, places = len(permutation.tokens), permutation.places.flatten()
    if count == len(places):
        return values.new_empty(count).scatter_(0, places, values.flatten())
    # -1 is one past the last.
    return values.new_empty(count + 1).scatter_(0, places.remainder(count + 1), values.flatten())[:count]


def by_choice(values: Float[Tensor, " rows"], places: Int64[Tensor, "tokens chosen"]) -> Float[Tensor, "tokens chosen"]:
    """Each row's number at the choice of that row; 0 where a choice is none."""
    return (values if len(values) == places.numel() else F.pad(values, (0, 1)))[places]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return _implementation(x).take_rows(x, places, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return _implementation(grad).sum_choices(grad, *ctx.saved_tensors), None, None


class _SumChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return _implementation(rows).sum_choices(rows, places, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        needs_rows, _, needs_residual = ctx.needs_input_grad
        rows = _implementation(grad).take_rows(grad, *ctx.saved_tensors, ctx.count) if needs_rows else None
        return rows, None, grad if needs_residual else None


def _implementation(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from benthic.kernels import permutation
    else:
        from benthic.numerics.reference import permutation
    return permutation

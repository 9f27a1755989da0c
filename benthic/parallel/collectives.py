"""Sums and gathers between layers that autograd knows: each one's gradient is the other.

What a rank computes from gathered rows is a part of the result, by its own heads, columns or words. So the gradient
that it has for those rows is a part too, and the parts are summed on the way back. DTensor's redistribution does the
same for DTensors; the operations here take plain tensors (kernels of ours, FP8), and wrapping each one would cost a
hundred microseconds of the host, ten times a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 has given these their second names and warns of the first.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered(piece: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
    """The pieces of all ranks, one after another along `dimension`; their gradients are summed over ranks."""
    return _Gathered.apply(piece, group, dimension)


def reduced(part: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
    """Of the sum of all ranks' tensors, this rank's piece along `dimension`; gradients of the pieces are gathered."""
    return _Reduced.apply(part, group, dimension)


def gather(piece: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
    """As `gathered`, without a gradient."""
    ranks = group.size()
    found = piece.new_empty(ranks * piece.shape[0], *piece.shape[1:])
    _all_gather(found, piece.contiguous(), group=group)
    if dimension % piece.ndim == 0:
        return found
    return found.unflatten(0, (ranks, -1)).movedim(0, dimension % piece.ndim).flatten(*_pair(dimension, piece.ndim))


def reduce(part: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
    """As `reduced`, without a gradient."""
    pieces = part.unflatten(dimension, (group.size(), -1)).movedim(dimension % part.ndim, 0).contiguous()
    mine = part.new_empty(pieces.shape[1:])
    _reduce_scatter(mine, pieces.flatten(0, 1), group=group)
    return mine


def _pair(dimension: int, dimensions: int) -> tuple[int, int]:
    return dimension % dimensions, dimension % dimensions + 1


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
        ctx.group, ctx.dimension = group, dimension
        return gather(piece, group, dimension)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return reduce(grad_outputs[0], ctx.group, ctx.dimension), None, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, dimension: int) -> Tensor:
        ctx.group, ctx.dimension = group, dimension
        return reduce(part, group, dimension)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return gather(grad_outputs[0], ctx.group, ctx.dimension), None, None

"""Dispatch in FP8 (DeepSeek-V3, section 3.3.3): half the bytes of bfloat16. Results, and gradients both ways, travel in
bfloat16.

A token is quantised once, at home, in tiles of 1 x 128, and its experts multiply what arrives as it is: the numbers are
those of one process that computes in FP8. Values and scales of a row travel together, as bytes, which every backend
can send.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.float8 import Float8Rows, arithmetic
from benthic.ops.permutation import Permutation, sum_choices
from benthic.parallel.exchange import Splits, exchanged


def exchanged_float8(
    tokens: Float[Tensor, "tokens width"], in_float8: Float8Rows, permutation: Permutation, splits: Splits
) -> tuple[Float[Tensor, "received width"], Float8Rows]:
    """The rows that came, in FP8, and a stand-in of their shape in tokens' dtype that leads gradients home; its
    numbers mean nothing. `in_float8` is quantise_activation(tokens)."""
    stand_in = _StandIn.apply(tokens, permutation, splits)
    with torch.no_grad():
        rows = arithmetic(tokens.device.type).take(*in_float8, permutation.tokens)
        return stand_in, unpacked(exchanged(packed(*rows), splits), tokens.shape[1])


def packed(values: Tensor, scales: Tensor) -> Tensor:
    """FP8 [R, D] and float32 [blocks, R] as bytes [R, D + 4 blocks]."""
    by_row = scales.t().reshape(-1).view(torch.uint8).view(len(values), 4 * len(scales))
    return torch.cat((values.view(torch.uint8), by_row), 1)


def unpacked(rows: Tensor, width: int) -> Float8Rows:
    """`packed`, taken apart."""
    values = rows[:, :width].contiguous().view(torch.float8_e4m3fn)
    return Float8Rows(values, rows[:, width:].contiguous().view(torch.float32).t().contiguous())


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation, splits: Splits) -> Tensor:
        ctx.permutation, ctx.splits = permutation, splits
        return tokens.new_zeros(1, 1).expand(sum(splits.received), tokens.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (gradient,) = grad_outputs
        return sum_choices(exchanged(gradient, ctx.splits.reversed()), ctx.permutation), None, None

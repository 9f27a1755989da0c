"""FP8 block quantisation of weights, as DeepSeek-V3 publishes them (arXiv:2412.19437 section 3.3.2).

A weight [R, C] is cut into blocks of 128 x 128, the last of a row or column ragged. A block stores e4m3 values and one
fp32 `scale_inv`, the factor that gives the weight back:

    scale_inv = amax(block) / 448        value = weight / scale_inv        weight ~ value * scale_inv

The error of an element is at most max(|weight| * 2^-4, scale_inv * 2^-10): half a step of three mantissa bits, or half
a step of the subnormals. Rounding scales up to powers of two (ue8m0, V3.1 and later) keeps that bound.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from benthic.errors import NumericsError

BLOCK = (128, 128)
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""Scales below it are fp32 subnormals, which some devices flush to zero; ue8m0 starts near it too."""


def quantise_blocks(
    weight: Tensor, block: tuple[int, int] = BLOCK, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """`weight` [R, C] -> (values float8_e4m3fn [R, C], scale_inv float32 [ceil(R / block), ceil(C / block)]).

    A block of zeros gets scale 1. `power_of_two` rounds scales up to powers of two. Raises NumericsError with the
    first position that is not finite, because one such element would spoil its whole block.
    """
    weight = weight.float()
    _refuse_non_finite(weight)
    maxima = _block_maxima(weight, block)
    scale_inv = (maxima / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        scale_inv = _next_power_of_two(scale_inv)
    scale_inv = torch.where(maxima > 0, scale_inv, 1.0)
    values = weight / _spread(scale_inv, weight.shape, block)
    return values.to(torch.float8_e4m3fn), scale_inv


def dequantise_blocks(
    values: Tensor, scale_inv: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """values [R, C] * scale_inv [ceil(R / block), ceil(C / block)], multiplied in fp32, then cast to `dtype`."""
    wanted = tuple(-(-size // length) for size, length in zip(values.shape, block, strict=True))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)}; values {list(values.shape)} in blocks of {list(block)} "
            f"need {list(wanted)}"
        )
    return (values.float() * _spread(scale_inv.float(), values.shape, block)).to(dtype)


def _block_maxima(weight: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = weight.shape
    height, width = block
    padded = pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return blocks.amax(dim=(1, 3))


def _spread(scale_inv: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    spread = scale_inv.repeat_interleave(block[0], dim=0)[: shape[0]]
    return spread.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def _next_power_of_two(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa > 0.5, exponent, exponent - 1))


def _refuse_non_finite(weight: Tensor) -> None:
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        count = int((~finite).sum())
        raise NumericsError(
            f"{count} of {weight.numel()} elements are not finite, the first {weight[row, column].item()} at "
            f"[{row}, {column}]; fp8 quantisation needs finite weights"
        )

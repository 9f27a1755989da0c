"""FP8 block quantisation of weights, as DeepSeek-V3 publishes them (arXiv:2412.19437 section 3.3.2).

A weight [R, C] is cut into blocks of 128 x 128, the last of a row or column ragged. A block stores e4m3 values and one
fp32 `scale_inv`, the factor that gives the weight back:

    scale_inv = amax(block) / 448        value = weight / scale_inv        weight ~ value * scale_inv

The error of an element is at most max(|weight| * 2^-4, scale_inv * 2^-10): half a step of three mantissa bits, or half
a step of the subnormals. Rounding scales up to powers of two (ue8m0, V3.1 and later) keeps that bound. Work goes by
rows of blocks, so that it needs little memory beside its result.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float8e4m3fn, Float32, Shaped
from torch import Tensor
from torch.nn.functional import pad

from benthic.errors import NumericsError

BLOCK = (128, 128)
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""Scales below it are fp32 subnormals, which some devices flush to zero; ue8m0 starts near it too."""


def quantise_blocks(
    weight: Float[Tensor, "rows columns"], block: tuple[int, int] = BLOCK, power_of_two: bool = False
) -> tuple[Float8e4m3fn[Tensor, "rows columns"], Float32[Tensor, "row_blocks column_blocks"]]:
    """Values, and scale_inv [ceil(R / block), ceil(C / block)].

    A block of zeros gets scale 1. `power_of_two` rounds scales up to powers of two. Raises NumericsError with the
    first position that is not finite, because one such element would spoil its whole block.
    """
    _refuse_non_finite(weight)
    bands = [_quantise_band(band.float(), block[1], power_of_two) for band in weight.split(block[0])]
    return torch.cat([values for values, _ in bands]), torch.stack([scales for _, scales in bands])


def _quantise_band(band: Tensor, width: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """One row of blocks, `band` [at most block height, C], to its values and scales [ceil(C / width)]."""
    columns = band.shape[1]
    blocks = pad(band.abs(), (0, -columns % width)).view(len(band), -1, width)
    maxima = blocks.amax(dim=(0, 2))
    # Divided by a tensor: CUDA divides by a plain number through its reciprocal, and the last bit would differ there.
    scales = (maxima / maxima.new_tensor(E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        scales = _next_power_of_two(scales)
    scales = torch.where(maxima == 0, 1.0, scales)
    return (band / scales.repeat_interleave(width)[:columns]).to(torch.float8_e4m3fn), scales


def dequantise_blocks(
    values: Float[Tensor, "rows columns"],
    scale_inv: Shaped[Tensor, "row_blocks column_blocks"],
    block: tuple[int, int] = BLOCK,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows columns"]:
    """values [R, C] * scale_inv [ceil(R / block), ceil(C / block)], multiplied in fp32, then cast to `dtype`."""
    wanted = tuple(-(-size // length) for size, length in zip(values.shape, block, strict=True))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)}; values {list(values.shape)} in blocks of {list(block)} "
            f"need {list(wanted)}"
        )
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    height, width = block
    for band, target, scales in zip(values.split(height), result.split(height), scale_inv.float(), strict=True):
        target.copy_(band.float() * scales.repeat_interleave(width)[: values.shape[1]])
    return result


def _next_power_of_two(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa > 0.5, exponent, exponent - 1))


def _refuse_non_finite(weight: Tensor) -> None:
    finite = torch.isfinite(weight)
    if finite.all():
        return
    row, column = (~finite).nonzero()[0].tolist()
    raise NumericsError(
        f"{int((~finite).sum())} of {weight.numel()} elements are not finite, the first "
        f"{weight[row, column].item()} at [{row}, {column}]; fp8 quantisation needs finite weights"
    )

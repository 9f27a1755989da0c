"""Plain torch for benthic.kernels.quantise: same names, signatures and layouts. Slow; waits for the device."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


def quantise_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, C] -> (values float8_e4m3fn [T, C], scales float32 [ceil(C / 128), T])."""
    rows, columns = x.shape
    padded = pad(x.float(), (0, -columns % BLOCK))
    blocks = padded.view(rows, padded.shape[1] // BLOCK, BLOCK)
    scales = _scale(blocks.abs().amax(2), power_of_two)  # [T, blocks]
    values = (blocks * (1 / scales)[..., None]).view(padded.shape)[:, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales.T.contiguous()


def quantise_columns(x: Tensor, ends: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, C] in groups -> (values float8_e4m3fn [C, P], scales float32 [P / 128, C]); unused blocks hold NaN."""
    rows, columns = x.shape
    blocks = rows // BLOCK + len(ends)
    values = torch.full((columns, blocks * BLOCK), torch.nan, device=x.device).to(torch.float8_e4m3fn)
    scales = torch.full((blocks, columns), torch.nan, device=x.device)
    for block, count, rows_of_group in group_blocks(ends):
        group = x[rows_of_group].T.float().contiguous()  # [C, rows]
        group = pad(group, (0, -group.shape[1] % BLOCK))
        quantised, of_group = quantise_rows(group, power_of_two)
        values.view(torch.uint8)[:, block * BLOCK : (block + count) * BLOCK] = quantised.view(torch.uint8)
        scales[block : block + count] = of_group
    return values, scales


def quantise_weights(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight [E, R, C] -> (values float8_e4m3fn [E, R, C], scales float32 [E, ceil(R / 128), ceil(C / 128)])."""
    experts, rows, columns = weight.shape
    padded = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(experts, padded.shape[1] // BLOCK, BLOCK, -1, BLOCK)
    scales = _scale(blocks.abs().amax((2, 4)), power_of_two)
    values = (blocks * (1 / scales)[:, :, None, :, None]).view(padded.shape)[:, :rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def quantise_weights_with_transpose(
    weight: Tensor, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantise_weights, then the same transposed."""
    values, scales = quantise_weights(weight, power_of_two)
    return values, scales, values.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()


def dequantise_rows(values: Tensor, scales: Tensor) -> Tensor:
    """values [T, C] with scales [ceil(C / 128), T] -> float32 [T, C]."""
    return values.float() * scales.T.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]


def dequantise_weights(values: Tensor, scales: Tensor) -> Tensor:
    """values [E, R, C] with scales [E, ceil(R / 128), ceil(C / 128)] -> float32 [E, R, C]."""
    spread = scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return values.float() * spread[:, : values.shape[1], : values.shape[2]]


def group_blocks(ends: Tensor) -> list[tuple[int, int, slice]]:
    """(first block, number of blocks, rows) of every group in a transposed copy, see quantise_columns."""
    bounds = [0, *ends.tolist()]
    return [
        (start // BLOCK + expert, -((start - end) // BLOCK), slice(start, end))
        for expert, (start, end) in enumerate(pairwise(bounds))
    ]


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    scale = (amax * (1 / 448)).clamp(min=2.0**-126)
    if power_of_two:
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)

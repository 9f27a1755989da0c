"""Rotary position embedding, forward and backward, and the pieces that other kernels turn pairs with."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotary(x: Tensor, rotations: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """x [B, S, H, R] turned by rotations complex64 [S, R / 2], or turned back with `inverse` (the backward pass).

    x may have any strides with contiguous channels; the result is contiguous.
    """
    batch, positions, heads, width = x.shape
    out = x.new_empty(x.shape)
    if x.numel():
        together, warps = tile(heads, width)
        _rotary[(positions, batch, triton.cdiv(heads, together))](
            x, torch.view_as_real(rotations.contiguous()), out, heads, *x.stride()[:3],
            PAIRS=width // 2, BLOCK=triton.next_power_of_2(width // 2), HEADS=together,
            INTERLEAVED=interleaved, INVERSE=inverse, num_warps=warps,
        )  # fmt: skip
    return out


def tile(heads: int, width: int) -> tuple[int, int]:
    """Heads and warps of a program that works on `width` channels of each head: about 16 numbers a thread."""
    block = triton.next_power_of_2(width)
    together = min(triton.next_power_of_2(heads), max(1, 4096 // block))
    return together, max(1, min(8, together * block // 512))


@triton.jit
def load_pairs(rows, inside, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second numbers, float32 [ROWS, BLOCK], of the PAIRS pairs behind each of the pointers `rows`.

    Interleaved pairs are loaded together and parted in registers, so that accesses stay 16 bytes wide.
    """
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK)[None, :]
        loaded = tl.load(rows + c, mask=inside & (c < 2 * PAIRS), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(loaded, (ROWS, BLOCK, 2)))
    else:
        p = tl.arange(0, BLOCK)[None, :]
        first = tl.load(rows + p, mask=inside & (p < PAIRS), other=0.0).to(tl.float32)
        second = tl.load(rows + PAIRS + p, mask=inside & (p < PAIRS), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    rows, first, second, inside,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The opposite of load_pairs; rounds to the dtype that is pointed to."""
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK)[None, :]
        tl.store(rows + c, tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK)), mask=inside & (c < 2 * PAIRS))
    else:
        p = tl.arange(0, BLOCK)[None, :]
        tl.store(rows + p, first, mask=inside & (p < PAIRS))
        tl.store(rows + PAIRS + p, second, mask=inside & (p < PAIRS))


@triton.jit
def load_rotation(rotations, position, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr):
    """cos and sin, float32 [1, BLOCK], of the pairs at `position`; the sine negated with INVERSE."""
    cosine, sine = load_pairs(rotations + position * (2 * PAIRS), position >= 0, PAIRS, BLOCK, 1, True)
    if INVERSE:
        sine = -sine
    return cosine, sine


@triton.jit
def turn(first, second, cosine, sine):
    """Pairs as complex numbers times a rotation."""
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _rotary(
    x, rotations, out, H, batch_stride, position_stride, head_stride,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    position, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = sequence * tl.num_programs(0) + position
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)  # heads may be the outermost dimension
    source = x + sequence * batch_stride + position * position_stride + h * head_stride
    first, second = load_pairs(source, h < H, PAIRS, BLOCK, HEADS, INTERLEAVED)
    cosine, sine = load_rotation(rotations, position, PAIRS, BLOCK, INVERSE)
    first, second = turn(first, second, cosine, sine)
    store_pairs(out + (token * H + h) * (2 * PAIRS), first, second, h < H, PAIRS, BLOCK, HEADS, INTERLEAVED)

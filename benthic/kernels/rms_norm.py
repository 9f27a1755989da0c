"""Root-mean-square normalisation, alone or with the addition to the residual stream before it; forward and backward.

A program keeps whole rows in registers, several where rows are short, so that every tensor is read or written once.
Backward starts as many programs as are resident at once: each walks over many rows, fetches the next two while it works
on one, and adds up its own part of the weight's gradient; the parts are then summed in a fixed order. Rows of 16,384
are the widest that registers hold.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_FETCH_BYTES = 96 << 10
"""Shared memory for rows that are fetched ahead: what the smallest of the supported GPUs has."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] of any row stride, weight [D] -> (x / rms(x) * weight [T, D], 1 / rms(x) float32 [T])."""
    normed, inverse = x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
    _launch_forward(x, None, weight, None, normed, inverse, eps)
    return normed, inverse


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """residual and x [T, D] of any row stride, weight [D] -> (their sum [T, D], the sum normalised as rms_norm does,
    1 / rms(sum) float32 [T])."""
    total, normed, inverse = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
    _launch_forward(x, residual, weight, total, normed, inverse, eps)
    return total, normed, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the normalised rows [T, D] -> gradients of x [T, D] and of weight [D], in the dtypes of both."""
    return _launch_backward(grad, None, x, weight, inverse)


def add_rms_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum and of the normalised rows -> one gradient [T, D] for residual and x, and weight's [D]."""
    return _launch_backward(grad_normed, grad_total, total, weight, inverse)


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
    eps: float,
) -> None:
    rows, width = x.shape
    block, together, warps = _tile(width)
    if rows:
        _forward[(triton.cdiv(rows, together),)](
            x, residual, weight, total, normed, inverse, rows, x.stride(0), _row_stride(residual), eps,
            WIDTH=width, BLOCK=block, ROWS=together, num_warps=warps,
        )  # fmt: skip


def _launch_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """With h = x / rms(x): dx = (w dy - h mean(w dy h)) / rms(x) + what comes past the norm, dw = sum dy h."""
    rows, width = x.shape
    block, together, warps = _tile(width)
    programs = max(1, min(triton.cdiv(rows, together), _warps_at_once(x.device) // warps))
    fetched = (2 + (grad_total is not None)) * block * together * x.element_size()
    grad_x, parts = x.new_empty(x.shape), x.new_empty((programs, width), dtype=torch.float32)
    _backward[(programs,)](
        grad, grad_total, x, weight, inverse, grad_x, parts, rows, grad.stride(0), _row_stride(grad_total), x.stride(0),
        WIDTH=width, BLOCK=block, ROWS=together, STAGES=1 + min(2, _FETCH_BYTES // fetched), num_warps=warps,
    )  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tile(width: int) -> tuple[int, int, int]:
    """Columns (a power of two), rows and warps of a program: 16 numbers a thread, two 16-byte loads of bfloat16."""
    block = triton.next_power_of_2(width)
    together = max(1, min(64, 2048 // block))
    return block, together, max(1, min(16, block * together // 512))


@cache
def _warps_at_once(device: torch.device) -> int:
    """How many warps backward starts: a quarter of what multiprocessors hold, as its registers allow no more."""
    if device.type != "cuda":
        return 64
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["T"])
def _forward(
    x, residual, weight, total, normed, inverse, T, x_stride, residual_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    inside = (t < T)[:, None] & (c < WIDTH)
    row = t[:, None]
    values = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    gain = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # what the next layer reads is what is normalised
        tl.store(total + row * WIDTH + c, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = (tl.sum(values * values, 1) / WIDTH + eps).to(tl.float32)  # torch.compile passes eps as float64
    scale = tl.rsqrt(mean)
    tl.store(inverse + t, scale, mask=t < T)
    tl.store(normed + row * WIDTH + c, (values * scale[:, None] * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, grad_total, x, weight, inverse, grad_x, parts, T, grad_stride, grad_total_stride, x_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    grad_gain = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        t = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row = t[:, None]
        inside = (row < T) & (c < WIDTH)
        scale = tl.load(inverse + t, mask=t < T, other=0.0)[:, None]
        unit = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32) * scale  # [ROWS, BLOCK]
        incoming = tl.load(grad + row * grad_stride + c, mask=inside, other=0.0).to(tl.float32)
        grad_gain += incoming * unit
        incoming *= gain
        along = tl.sum(incoming * unit, 1)[:, None] / WIDTH
        result = (incoming - unit * along) * scale
        if grad_total is not None:
            result += tl.load(grad_total + row * grad_total_stride + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * WIDTH + c, result.to(grad_x.dtype.element_ty), mask=inside)
    part = parts + tl.program_id(0) * WIDTH + tl.arange(0, BLOCK)
    tl.store(part, tl.sum(grad_gain, 0), mask=tl.arange(0, BLOCK) < WIDTH)

"""From FP8 tiles of 1 x 128 to tiles of 128 x 1, transposed, and FP8 rows in another order.

A tensor that was quantised by rows once is what a weight gradient needs, but for its tiles: they must run down the
tokens it sums over (arXiv:2412.19437, section 3.3.2). Reading e4m3 back and quantising it again moves 2 bytes an
element where the bfloat16 original costs 3, and where both scales are powers of two it changes exponents alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benthic.kernels.hopper import require, require_fp8
from benthic.kernels.quantise import BLOCK


def retile_columns(
    values: Tensor, scales: Tensor, ends: Tensor, tokens: Tensor | None = None, registers: int | None = None
) -> tuple[Tensor, Tensor]:
    """values float8_e4m3fn [T, C] with scales float32 [ceil(C / 128), T], powers of two (quantise_rows) -> the layout
    of quantise_columns: values [C, P], scales [P / 128, C], powers of two.

    With `tokens` int64 [R], row r of the R that `ends` cuts into groups is values[tokens[r]]: no copy of the rows in
    that order is needed. C must be a multiple of 16. `registers`: as for quantise_columns.
    """
    rows, columns = values.shape
    require_fp8("values", values, (rows, columns))
    require("scales", scales, (triton.cdiv(columns, BLOCK), rows), torch.float32)
    require("ends", ends, (len(ends),), torch.int32)
    taken = rows if tokens is None else len(tokens)
    blocks = taken // BLOCK + len(ends)
    result = values.new_empty((columns, blocks * BLOCK))
    result_scales = scales.new_empty((blocks, columns))
    if taken:
        _retile[(triton.cdiv(columns, 64), blocks)](
            values, scales, ends, tokens, result, result_scales, rows, columns, blocks * BLOCK, len(ends),
            TAKES=tokens is not None, GROUPS=triton.next_power_of_2(len(ends)), WIDTH=64,
            num_warps=4, maxnreg=registers,
        )  # fmt: skip
    return result, result_scales


def take_quantised_rows(values: Tensor, scales: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `tokens` int64 [R] of values [T, C] (e4m3, C a multiple of 16) with scales float32 [blocks, T]."""
    rows, columns = values.shape
    blocks = triton.cdiv(columns, BLOCK)
    require_fp8("values", values, (rows, columns))
    require("scales", scales, (blocks, rows), torch.float32)
    taken = values.new_empty((len(tokens), columns))
    taken_scales = scales.new_empty((blocks, len(tokens)))
    if len(tokens):
        words = columns // 4
        _take[(triton.cdiv(len(tokens), 8), triton.cdiv(words, 512))](
            values.view(torch.int32), scales, tokens, taken.view(torch.int32), taken_scales,
            rows, len(tokens), words, blocks, ROWS=8, WORDS=512, num_warps=4,
        )  # fmt: skip
    return taken, taken_scales


@triton.jit
def _take(
    values, scales, tokens, taken, taken_scales, T, R, WIDTH, BLOCKS, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    valid = r < R
    t = tl.load(tokens + r, mask=valid, other=0)
    inside = valid[:, None] & (w < WIDTH)[None, :]
    words = tl.load(values + t[:, None] * WIDTH + w[None, :], mask=inside, other=0)  # [ROWS, WORDS]
    tl.store(taken + r[:, None] * WIDTH + w[None, :], words, mask=inside)
    # 512 words have 16 scales.
    block = tl.program_id(1) * (WORDS // 32) + tl.arange(0, WORDS // 32)
    inside = (block < BLOCKS)[:, None] & valid[None, :]
    scale = tl.load(scales + block[:, None].to(tl.int64) * T + t[None, :], mask=inside, other=0.0)
    tl.store(taken_scales + block[:, None].to(tl.int64) * R + r[None, :], scale, mask=inside)


@gluon.jit
def _retile(
    values, scales, ends, tokens, result, result_scales, T, C, P, E,
    TAKES: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    # The layouts and the search for the group are those of quantise_columns.
    WARPS: gl.constexpr = gl.num_warps()
    LOAD: gl.constexpr = gl.BlockedLayout([8, 8], [32 // (WIDTH // 8), WIDTH // 8], [WARPS, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1])
    block = gl.program_id(1)
    group = gl.arange(0, GROUPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    starts = gl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    mine = gl.sum(((starts // 128 + group <= block) & (group < E)).to(gl.int32), 0) - 1  # the last to start by here
    start = gl.load(ends + mine - 1, mask=mine > 0, other=0)
    end = gl.load(ends + mine)
    first = start + (block - (start // 128 + mine)) * 128
    if first < end:
        row = first + gl.arange(0, 128, layout=gl.SliceLayout(1, LOAD))
        c = gl.program_id(0) * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LOAD))
        valid = row < end
        if TAKES:
            t = gl.load(tokens + row, mask=valid, other=0)
        else:
            t = row.to(gl.int64)
        inside = valid[:, None] & (c < C)[None, :]
        loaded = gl.load(values + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(gl.float32)
        row_scale = gl.load(scales + (gl.program_id(0) * WIDTH // 128).to(gl.int64) * T + t, mask=valid, other=0.0)
        loaded = loaded * row_scale[:, None]
        amax = gl.max(gl.abs(loaded), 0)
        scale = gl.maximum(amax * (1.0 / 448.0), 1.1754943508222875e-38)
        scale = ((scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(gl.float32, bitcast=True)
        scale = gl.where(amax == 0, 1.0, scale)
        gl.store(result_scales + block * C + c, scale, mask=c < C)
        quantised = gl.convert_layout((loaded * (1.0 / scale)[None, :]).to(gl.float8e4nv), STORE)
        p = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, STORE))
        c = gl.program_id(0) * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, STORE))
        gl.store(result + c[None, :].to(gl.int64) * P + p[:, None], quantised, mask=(c < C)[None, :])

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
from benthic.kernels.quantise import BLOCK, quad_layout, rows_of_block, store_columns


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
    values, scales, ends, tokens, result, result_scales, T, C, WORDS, E,
    TAKES: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    block = gl.program_id(1)
    first, end = rows_of_block(ends, block, E, GROUPS)
    if first < end:
        LOAD: gl.constexpr = quad_layout(WIDTH, gl.num_warps())
        row = first + 4 * gl.arange(0, 32, layout=gl.SliceLayout(1, LOAD))
        c = gl.program_id(0) * (WIDTH * TILES) + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LOAD))
        t0 = _token(tokens, row, end, TAKES)
        t1 = _token(tokens, row + 1, end, TAKES)
        t2 = _token(tokens, row + 2, end, TAKES)
        t3 = _token(tokens, row + 3, end, TAKES)
        scales += (gl.program_id(0) * (WIDTH * TILES) // 128).to(gl.int64) * T
        ahead = _load_quads(values, scales, t0, t1, t2, t3, row, c, T, C, end)
        for tile in gl.static_range(TILES):
            x0, x1, x2, x3, s0, s1, s2, s3 = ahead
            if tile + 1 < TILES:
                of_tile = scales + ((tile + 1) * WIDTH // 128) * T.to(gl.int64)
                ahead = _load_quads(values, of_tile, t0, t1, t2, t3, row, c + (tile + 1) * WIDTH, T, C, end)
            store_columns(
                x0.to(gl.float32) * s0[:, None], x1.to(gl.float32) * s1[:, None],
                x2.to(gl.float32) * s2[:, None], x3.to(gl.float32) * s3[:, None],
                result, result_scales, block, (gl.program_id(0) * TILES + tile) * WIDTH, C, WORDS, True,
            )  # fmt: skip


@gluon.jit
def _token(tokens, row, end, TAKES: gl.constexpr):
    if TAKES:
        return gl.load(tokens + row, mask=row < end, other=0)
    else:
        return row.to(gl.int64)


@gluon.jit
def _load_quads(values, scales, t0, t1, t2, t3, row, c, T, C, end):
    x0, s0 = _load(values, scales, t0, row < end, c, C)
    x1, s1 = _load(values, scales, t1, row + 1 < end, c, C)
    x2, s2 = _load(values, scales, t2, row + 2 < end, c, C)
    x3, s3 = _load(values, scales, t3, row + 3 < end, c, C)
    return x0, x1, x2, x3, s0, s1, s2, s3


@gluon.jit
def _load(values, scales, t, valid, c, C):
    inside = valid[:, None] & (c < C)[None, :]
    return gl.load(values + t[:, None] * C + c[None, :], mask=inside, other=0.0), gl.load(
        scales + t, mask=valid, other=0.0
    )

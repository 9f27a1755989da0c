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
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from benthic.kernels.hopper import require, require_fp8
from benthic.kernels.quantise import (
    BLOCK,
    copy_layout,
    fetch_tiles,
    quad_layout,
    quads,
    rows_of_block,
    rows_of_quads,
    store_columns,
)


def retile_columns(
    values: Tensor,
    scales: Tensor,
    ends: Tensor,
    tokens: Tensor | None = None,
    tiles: int = 4,
    registers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """values float8_e4m3fn [T, C] with scales float32 [ceil(C / 128), T], powers of two (quantise_rows) -> the layout
    of quantise_columns: values [C, P], scales [P / 128, C], powers of two.

    With `tokens` int64 [R], row r of the R that `ends` cuts into groups is values[tokens[r]]: no copy of the rows in
    that order is needed. C must be a multiple of 16. `tiles` (1, or even) and `registers`: as for quantise_columns.
    """
    if tiles != 1 and tiles % 2:
        raise ValueError(f"tiles must be 1 or even, not {tiles}: a scale of a row is for two tiles")
    rows, columns = values.shape
    require_fp8("values", values, (rows, columns))
    require("scales", scales, (triton.cdiv(columns, BLOCK), rows), torch.float32)
    require("ends", ends, (len(ends),), torch.int32)
    taken = rows if tokens is None else len(tokens)
    blocks = taken // BLOCK + len(ends)
    result = values.new_empty((columns, blocks * BLOCK))
    result_scales = scales.new_empty((blocks, columns))
    if taken:
        _retile[(triton.cdiv(columns, 64 * tiles), blocks)](
            values, scales, ends, tokens, result.view(torch.int32), result_scales,
            rows, columns, blocks * BLOCK // 4, len(ends),
            TAKES=tokens is not None, GROUPS=triton.next_power_of_2(len(ends)), WIDTH=64, TILES=tiles,
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


@triton.jit(do_not_specialize=["T", "BLOCKS"])
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


@gluon.jit(do_not_specialize=["T", "E"])  # what they are divisible by helps nothing: fewer compilations
def _retile(
    values, scales, ends, tokens, result, result_scales, T, C, WORDS, E,
    TAKES: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    block = gl.program_id(1)
    first, end = rows_of_block(ends, block, E, GROUPS)
    if first < end:
        COPY: gl.constexpr = copy_layout(WIDTH, 1, gl.num_warps())
        column = gl.program_id(0) * (WIDTH * TILES)
        tables = _fetch_scales(scales, tokens, first, end, column, T, C, TAKES, (WIDTH * TILES + 127) // 128)
        row = first + quads(gl.SliceLayout(1, COPY))
        c = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPY))
        t = _token(tokens, row, end, TAKES)
        ring = fetch_tiles(values + t[:, None] * C + c[None, :], row < end, c, C, TILES)
        for tile in range(TILES):
            async_copy.wait_group(TILES - 1)
            mine, table = ring.index(tile), tables.index(tile * WIDTH // 128)
            store_columns(
                _scaled(mine, table, 0), _scaled(mine, table, 1), _scaled(mine, table, 2), _scaled(mine, table, 3),
                result, result_scales, block, column + tile * WIDTH, C, WORDS, True,
            )  # fmt: skip
            async_copy.commit_group()  # an empty one: each turn waits for all but TILES - 1


@gluon.jit
def _fetch_scales(
    scales, tokens, first, end, column, T, C, TAKES: gl.constexpr, TABLES: gl.constexpr
):  # fmt: skip
    # [TABLES, 128] in shared memory, one for each 128 columns; part of the first group of copies.
    row = first + quads(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    t = _token(tokens, row, end, TAKES)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    tables = gl.allocate_shared_memory(gl.float32, [TABLES, 128], PLAIN)
    for table in gl.static_range(TABLES):
        inside = (row < end) & (column + table * 128 < C)
        pointers = scales + (column // 128 + table).to(gl.int64) * T + t
        async_copy.async_copy_global_to_shared(tables.index(table), pointers, inside)
    return tables


@gluon.jit
def _scaled(tile, table, j: gl.constexpr):
    LOAD: gl.constexpr = quad_layout(tile.shape[1], gl.num_warps())
    return rows_of_quads(tile, j) * table.slice(32 * j, 32).load(gl.SliceLayout(1, LOAD))[:, None]


@gluon.jit
def _token(tokens, row, end, TAKES: gl.constexpr):
    if TAKES:
        return gl.load(tokens + row, mask=row < end, other=0)
    else:
        return row.to(gl.int64)

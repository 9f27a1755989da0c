"""Grouped FP8 weight gradient for the experts, on Hopper, in Gluon: each group's sum over its own tokens.

Both operands are transposed copies (quantise_columns) scaled 1 x 128 along tokens, so that a product needs a scale for
its row and one for its column, and the promotion two operations an element instead of one: they and not the tensor
cores set the pace (docs/kernels-fp8.md). The tile is 256 x 128 with a warpgroup on 128 x 128, which loads a thread's 32
column scales once for both of its 64-row halves.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.hopper import descriptor, multiprocessors, next_stage, require, require_fp8, store_rows

TILE = (256, 128)
STAGES = 3
BUFFERS = {torch.float32: 1, torch.bfloat16: 2}
"""49.5 KiB a stage, 64 KiB of result buffers in either type."""


def grouped_weight_gradient_fp8(
    gradient: Tensor,
    gradient_scales: Tensor,
    inputs: Tensor,
    input_scales: Tensor,
    ends: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """For each group e, gradient[:, e] [M, tokens] times inputs[:, e] [N, tokens] transposed -> `dtype` [E, M, N].

    gradient float8_e4m3fn [M, P] with gradient_scales float32 [P / 128, M], and inputs [N, P] with [P / 128, N], are
    what quantise_columns makes of [T, M] and [T, N] with the same `ends` int32 [E] (device). Groups may have any
    length; an empty one gets zeros; the host never waits. `dtype` is float32 or bfloat16. M and N must be multiples
    of 8.
    """
    (rows, depth), (columns, _), experts = gradient.shape, inputs.shape, len(ends)
    require_fp8("gradient", gradient, (rows, depth))
    require_fp8("inputs", inputs, (columns, depth))
    require("gradient_scales", gradient_scales, (depth // 128, rows), torch.float32)
    require("input_scales", input_scales, (depth // 128, columns), torch.float32)
    require("ends", ends, (experts,), torch.int32)
    if dtype not in BUFFERS:
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(map(str, BUFFERS))}")
    if rows % 8 or columns % 8:
        raise ValueError(f"the gradient is {rows} x {columns}; both need to be multiples of 8 (16-byte rows)")
    result = gradient.new_empty((experts, rows, columns), dtype=dtype)
    flat = result.view(experts * rows, columns)
    _kernel[(multiprocessors(gradient.device),)](
        descriptor(gradient, (TILE[0], 128)),
        descriptor(inputs, (TILE[1], 128)),
        descriptor(gradient_scales.view(-1), (TILE[0],)),
        descriptor(input_scales.view(-1), (TILE[1],)),
        descriptor(flat, (64, 128)),
        flat, ends, experts, rows, columns,
        TILE_M=TILE[0], TILE_N=TILE[1], STAGES=STAGES, BUFFERS=BUFFERS[dtype], num_warps=4,
    )  # fmt: skip
    return result


def token_groups(tokens: int, rows: int, columns: int, device: torch.device) -> int:
    """Into how many groups to cut the tokens of one [rows, columns] gradient, so that its tiles fill the device.

    More groups finish in less of a last, half-empty turn; each costs a float32 partial sum written and read, as long
    as 7 steps of 128 tokens of every tile.
    """
    tiles = triton.cdiv(rows, TILE[0]) * triton.cdiv(columns, TILE[1])

    def turns(groups: int) -> float:
        partial_sums = 7 * groups * tiles / tokens if groups > 1 else 0
        return triton.cdiv(tiles * groups, multiprocessors(device)) / groups + partial_sums

    return min(range(1, max(1, min(8, tokens // 1024)) + 1), key=turns)


@gluon.jit
def _position(tile, row_tiles, column_tiles):
    """(group, row tile, column tile) of a tile: bands of 8 row tiles, down first, so that neighbours share in L2."""
    BAND: gl.constexpr = 8
    group = tile // (row_tiles * column_tiles)
    local = tile - group * (row_tiles * column_tiles)
    band = local // (BAND * column_tiles)
    height = gl.minimum(row_tiles - band * BAND, BAND)
    within = local - band * (BAND * column_tiles)
    column = within // height
    return group, band * BAND + within - column * height, column


@gluon.jit
def _start(ends, group):
    return gl.load(ends + group - 1, mask=group > 0, other=0)


@gluon.jit
def _produce(
    a, b, a_scales, b_scales, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends, E, M, N,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(M, TILE_M)
    column_tiles = gl.cdiv(N, TILE_N)
    BYTES: gl.constexpr = (TILE_M + TILE_N) * (128 + 4)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * row_tiles * column_tiles, gl.num_programs(0)):
        group, row, column = _position(tile, row_tiles, column_tiles)
        start = _start(ends, group)
        first = start // 128 + group
        for k in range(first, first + gl.cdiv(gl.load(ends + group) - start, 128)):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            tma.async_copy_global_to_shared(a_scales, [k * M + row * TILE_M], ready, a_scale_ring.index(stage))
            tma.async_copy_global_to_shared(b_scales, [k * N + column * TILE_N], ready, b_scale_ring.index(stage))
            tma.async_copy_global_to_shared(a, [row * TILE_M, k * 128], ready, a_ring.index(stage))
            tma.async_copy_global_to_shared(b, [column * TILE_N, k * 128], ready, b_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _consume(
    result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends, E, M, N,
    HALF: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    FRAGMENT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, FRAGMENT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, FRAGMENT)
    row_tiles = gl.cdiv(M, TILE_M)
    column_tiles = gl.cdiv(N, TILE_N)
    tiles = E * row_tiles * column_tiles
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    product = gl.zeros([64, 128], gl.float32, FRAGMENT)  # always overwritten; carried so that its registers are reused
    tile = gl.program_id(0)
    first_group = gl.minimum(tile // (row_tiles * column_tiles), E - 1)
    tokens = gl.load(ends + first_group) - _start(ends, first_group)
    while tile < tiles:  # a `for` loop would fold the next tile's `tokens` to the first's (Triton 3.6)
        group, row, column = _position(tile, row_tiles, column_tiles)
        tile += gl.num_programs(0)
        next_group = gl.minimum(tile, tiles - 1) // (row_tiles * column_tiles)
        next_tokens = gl.load(ends + next_group) - _start(ends, next_group)
        upper = gl.zeros([64, 128], gl.float32, FRAGMENT)
        lower = gl.zeros([64, 128], gl.float32, FRAGMENT)
        for _ in range(gl.cdiv(tokens, 128)):
            mbarrier.wait(full.index(stage), phase)
            a_upper = a_ring.index(stage).slice(HALF * 128, 64, dim=0)
            a_lower = a_ring.index(stage).slice(HALF * 128 + 64, 64, dim=0)
            b = b_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(a_upper, b, product, use_acc=False, is_async=True)
            upper_scale = a_scale_ring.index(stage).slice(HALF * 128, 64).load(ROWS)
            lower_scale = a_scale_ring.index(stage).slice(HALF * 128 + 64, 64).load(ROWS)
            b_scale = b_scale_ring.index(stage).load(COLUMNS)
            product = warpgroup_mma_wait(0, deps=(product,))
            upper += (product * upper_scale[:, None]) * b_scale[None, :]
            product = warpgroup_mma(a_lower, b, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            lower += (product * lower_scale[:, None]) * b_scale[None, :]
            stage, phase = next_stage(stage, phase, STAGES)
        end = group * M + M
        row = group * M + row * TILE_M + HALF * 128
        column = column * TILE_N
        first, second = buffers.index(HALF * BUFFERS), buffers.index(HALF * BUFFERS + BUFFERS - 1)
        store_rows(upper, result_descriptor, result, first, row, column, end, N, BUFFERS - 1)
        store_rows(lower, result_descriptor, result, second, row + 64, column, end, N, BUFFERS - 1)
        tokens = next_tokens
    tma.store_wait(0)


# One compilation for all shapes. Of constants, the compiler could also find a comparison in store_rows to be of equals,
# and fails on the branch that is then never taken (docs/kernels-fp8.md).
@gluon.jit(do_not_specialize=["E", "M", "N"])
def _kernel(
    a, b, a_scales, b_scales, result_descriptor, result, ends, E, M, N,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_M, 128], a.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_N, 128], b.layout)
    a_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_M], a_scales.layout)
    b_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_N], b_scales.layout)
    buffers = gl.allocate_shared_memory(result.dtype.element_ty, [2 * BUFFERS, 64, 128], result_descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both consumers
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends,
                    E, M, N, 0, TILE_M, TILE_N, STAGES, BUFFERS)),
        (_consume, (result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends,
                    E, M, N, 1, TILE_M, TILE_N, STAGES, BUFFERS)),
        (_produce, (a, b, a_scales, b_scales, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends, E,
                    M, N, TILE_M, TILE_N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip

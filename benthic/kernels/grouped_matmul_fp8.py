"""Grouped FP8 matmul for the experts' forward and input gradient, on Hopper, in Gluon.

The tile is 128 x 256 with K in steps of 128: 171 FLOP for each byte from L2, few enough bytes to do without
multicast. A consumer warpgroup owns 64 x 256 of it as two halves of 128 columns. The halves share one accumulator of
the tensor cores (64 registers): it is passed to the next wgmma as the operand that `use_acc=False` ignores, so that the
compiler must finish the promotion of one half before it reuses the registers, and needs no spill.

The two consumers take turns to issue: the tensor cores then work through one's products while the other promotes. Left
to themselves they fall into step, and both promote while the tensor cores wait: 4% slower (docs/kernels-fp8.md).
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.hopper import descriptor, multiprocessors, next_stage, require, require_fp8, store_rows

TILE = (128, 256)
STAGES, BUFFERS = 3, 2
"""48.6 KiB a stage and 32 KiB for a result buffer of both warpgroups. A fourth stage in place of the second buffer is
1.5% slower."""


def grouped_matmul_fp8(values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, ends: Tensor) -> Tensor:
    """values [T, K] of group e times weight[e] [N, K] transposed -> bfloat16 [T, N].

    values float8_e4m3fn with scales float32 [ceil(K / 128), T] (quantise_rows); weight float8_e4m3fn [E, N, K] with
    weight_scales float32 [E, ceil(N / 128), ceil(K / 128)] (quantise_weights); ends int32 [E] on the device, group e is
    the rows from ends[e - 1] to ends[e]. Groups may have any length, also 0, and need no padding; the host never waits.
    Products of 128 terms are summed by the tensor cores, those sums scaled and added in fp32. For the input gradient,
    pass the gradient and the transposed weight of quantise_weights_with_transpose.

    Rows from ends[-1] on are not written. K must be a multiple of 16, N of 8.
    """
    rows, depth = values.shape
    experts, columns, _ = weight.shape
    blocks = triton.cdiv(depth, 128)
    require_fp8("values", values, (rows, depth))
    require_fp8("weight", weight, (experts, columns, depth))
    require("scales", scales, (blocks, rows), torch.float32)
    require("weight_scales", weight_scales, (experts, triton.cdiv(columns, 128), blocks), torch.float32)
    require("ends", ends, (experts,), torch.int32)
    if columns % 8:
        raise ValueError(f"weight has {columns} rows; the bfloat16 result needs a multiple of 8 (16-byte rows)")
    result = values.new_empty((rows, columns), dtype=torch.bfloat16)
    if rows:
        _kernel[(multiprocessors(values.device),)](
            descriptor(values, (TILE[0], 128)),
            descriptor(weight.view(experts * columns, depth), (TILE[1], 128)),
            descriptor(result, (64, 128)),
            result, scales, weight_scales, ends, experts, rows, columns, blocks,
            TILE_M=TILE[0], TILE_N=TILE[1], STAGES=STAGES, BUFFERS=BUFFERS, num_warps=4,
        )  # fmt: skip
    return result


@gluon.jit
def _find_group(tile, group, first_tile, start, end, ends, E, column_tiles, TILE_M: gl.constexpr):
    """Moves on to the group of `tile`: (group, its first tile, its rows from `start` to `end`); E past the last."""
    tiles = gl.cdiv(end - start, TILE_M) * column_tiles
    while (group < E) & (tile >= first_tile + tiles):
        first_tile += tiles
        group += 1
        start = end
        if group < E:
            end = gl.load(ends + group)
        tiles = gl.cdiv(end - start, TILE_M) * column_tiles
    return group, first_tile, start, end


@gluon.jit
def _position(tile, start, end, column_tiles, TILE_M: gl.constexpr):
    """(row tile, column tile) of a group's tile: bands of 8 row tiles, down first, so that neighbours share in L2."""
    BAND: gl.constexpr = 8
    band = tile // (BAND * column_tiles)
    height = gl.minimum(gl.cdiv(end - start, TILE_M) - band * BAND, BAND)
    within = tile - band * (BAND * column_tiles)
    column = within // height
    return band * BAND + within - column * height, column


@gluon.jit
def _produce(
    a, b, a_scales, b_scales, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends, E, T, N, K_BLOCKS,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # Scales come by cp.async, not by the copy engine: that needs 16-byte coordinates, and a group starts at any row.
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    column_tiles = gl.cdiv(N, TILE_N)
    column_blocks = gl.cdiv(N, 128)
    tile = gl.program_id(0)
    group = gl.to_tensor(0)
    first_tile = gl.to_tensor(0)
    start = gl.to_tensor(0)
    end = gl.load(ends)
    group, first_tile, start, end = _find_group(tile, group, first_tile, start, end, ends, E, column_tiles, TILE_M)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    while group < E:
        row, column = _position(tile - first_tile, start, end, column_tiles, TILE_M)
        row = start + row * TILE_M
        block = gl.minimum(column * 2 + (gl.arange(0, 32, layout=LANES) & 1), column_blocks - 1)
        a_scale = a_scales + gl.minimum(row + gl.arange(0, TILE_M, layout=LANES), T - 1)
        b_scale = b_scales + (group * column_blocks + block) * K_BLOCKS
        for k in range(K_BLOCKS):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), a.block_type.nbytes + b.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [row, k * 128], full.index(stage), a_ring.index(stage))
            tma.async_copy_global_to_shared(
                b, [group * N + column * TILE_N, k * 128], full.index(stage), b_ring.index(stage)
            )
            async_copy.async_copy_global_to_shared(a_scale_ring.index(stage), a_scale)
            async_copy.async_copy_global_to_shared(b_scale_ring.index(stage), b_scale)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            a_scale += T
            b_scale += 1
            stage, phase = next_stage(stage, phase, STAGES)
        tile += gl.num_programs(0)
        group, first_tile, start, end = _find_group(tile, group, first_tile, start, end, ends, E, column_tiles, TILE_M)


@gluon.jit
def _consume(
    result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, turns, ends, E, N,
    K_BLOCKS, HALF: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    FRAGMENT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, FRAGMENT)
    column_tiles = gl.cdiv(N, TILE_N)
    tile = gl.program_id(0)
    group = gl.to_tensor(0)
    first_tile = gl.to_tensor(0)
    start = gl.to_tensor(0)
    end = gl.load(ends)
    group, first_tile, start, end = _find_group(tile, group, first_tile, start, end, ends, E, column_tiles, TILE_M)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(1 - HALF)  # the phase to wait for: the first consumer's first turn is free
    product = gl.zeros([64, 128], gl.float32, FRAGMENT)  # always overwritten; carried so that its registers are reused
    while group < E:
        row, column = _position(tile - first_tile, start, end, column_tiles, TILE_M)
        row = start + row * TILE_M + HALF * 64
        column = column * TILE_N
        left = gl.zeros([64, 128], gl.float32, FRAGMENT)
        right = gl.zeros([64, 128], gl.float32, FRAGMENT)
        for _ in range(K_BLOCKS):
            mbarrier.wait(full.index(stage), phase)
            a = a_ring.index(stage).slice(HALF * 64, 64, dim=0)
            b = b_ring.index(stage)
            b_left = b.slice(0, 128, dim=0).permute((1, 0))
            b_right = b.slice(128, 128, dim=0).permute((1, 0))
            mbarrier.wait(turns.index(HALF), turn)
            turn ^= 1
            product = warpgroup_mma(a, b_left, product, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(1 - HALF), count=1)
            a_scale = a_scale_ring.index(stage).slice(HALF * 64, 64).load(ROWS)
            left_scale = a_scale * b_scale_ring.index(stage).slice(0, 1).load(ROWS)
            right_scale = a_scale * b_scale_ring.index(stage).slice(1, 1).load(ROWS)
            product = warpgroup_mma_wait(0, deps=(product,))
            left += product * left_scale[:, None]
            mbarrier.wait(turns.index(HALF), turn)
            turn ^= 1
            product = warpgroup_mma(a, b_right, product, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(1 - HALF), count=1)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            right += product * right_scale[:, None]
            stage, phase = next_stage(stage, phase, STAGES)
        first, second = buffers.index(HALF * BUFFERS), buffers.index(HALF * BUFFERS + BUFFERS - 1)
        store_rows(left, result_descriptor, result, first, row, column, end, N, BUFFERS - 1)
        store_rows(right, result_descriptor, result, second, row, column + 128, end, N, BUFFERS - 1)
        tile += gl.num_programs(0)
        group, first_tile, start, end = _find_group(tile, group, first_tile, start, end, ends, E, column_tiles, TILE_M)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E", "T", "N", "K_BLOCKS"])  # one compilation for all shapes
def _kernel(
    a, b, result_descriptor, result, a_scales, b_scales, ends, E, T, N, K_BLOCKS,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_M, 128], a.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_N, 128], b.layout)
    a_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_M], PLAIN)
    b_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 32], PLAIN)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 64, 128], result_descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=33)  # the copy engine's bytes, and each producer lane's scales
        mbarrier.init(empty.index(i), count=2)  # both consumers
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, turns,
                    ends, E, N, K_BLOCKS, 0, TILE_M, TILE_N, STAGES, BUFFERS)),
        (_consume, (result_descriptor, result, buffers, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, turns,
                    ends, E, N, K_BLOCKS, 1, TILE_M, TILE_N, STAGES, BUFFERS)),
        (_produce, (a, b, a_scales, b_scales, a_ring, b_ring, a_scale_ring, b_scale_ring, full, empty, ends, E, T,
                    N, K_BLOCKS, TILE_M, TILE_N, STAGES)),
    ], [4, 1], [232, 40])  # fmt: skip

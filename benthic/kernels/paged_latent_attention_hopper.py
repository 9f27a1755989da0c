"""Latent attention over a paged cache on Hopper, in Gluon: 64 rows, blocks of 64 keys, 512 + 64 numbers a key.

A 64 x 512 float32 result is 32,768 registers, half of a multiprocessor's, so two consumer warpgroups own 256 columns
each. The first multiplies queries and keys, keeps the softmax and hands its weights to the second through shared
memory; both then multiply the weights with their half of the latents, while a producer warp fills the other of two
stages through the copy engine. Tensor cores do no work twice, and a latent is read once for 64 rows:

    queries 73,728 B    two stages of keys 147,456 B    weights 8,192 B    of 232,448 B

With 16 or 64 heads the keys' bytes set the pace (4.22 TB/s / 132 is 73,728 B in 2.3 us), with 128 the tensor cores.
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

from benthic.kernels.hopper import descriptor, next_stage
from benthic.kernels.paged_context import LOG2_E, combine, require_paged, shares_of_context, tile_count

RANK, TURNING = 512, 64
ROWS, KEYS = 64, 64


def suits(query: Tensor, pool: Tensor, rank: int) -> bool:
    """Whether this kernel takes these: DeepSeek's widths in bfloat16, blocks of a multiple of 64 keys, on sm_90."""
    return (
        query.is_cuda
        and query.dtype == pool.dtype == torch.bfloat16
        and rank == RANK
        and query.shape[2] == RANK + TURNING
        and pool.shape[1] % KEYS == 0
        and torch.cuda.get_device_capability(query.device) == (9, 0)
    )


def absorbed_paged_attention(
    query: Tensor,
    pool: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    rank: int,
    first: int = 0,
) -> Tensor:
    """kernels.paged_latent_attention.absorbed_paged_attention, for what `suits`."""
    require_paged(query, pool, tables, starts, lengths)
    if not suits(query, pool, rank):
        raise ValueError(
            f"queries {list(query.shape)} {query.dtype} over a pool {list(pool.shape)} with latents of {rank}: this "
            f"kernel is for bfloat16 rows of {RANK} + {TURNING} in blocks of a multiple of {KEYS}, on sm_90"
        )
    tokens, heads, width = query.shape
    batch, block = len(lengths), pool.shape[1]
    out = query.new_empty((tokens, heads, rank))
    if not tokens:
        return out
    tiles = tile_count(tokens, batch, heads, ROWS)
    shares = shares_of_context(tiles, tables.shape[1] * block, KEYS, query.device)
    partial = out.new_empty((shares, tokens * heads, rank), dtype=torch.float32) if shares > 1 else out
    logarithms = out.new_empty((shares, tokens * heads), dtype=torch.float32)
    rows, keys = query.view(-1, width), pool.view(-1, width)
    _kernel[(tiles, shares)](
        descriptor(rows, (ROWS, 256)), descriptor(rows, (ROWS, TURNING)),
        descriptor(keys, (KEYS, 256)), descriptor(keys, (KEYS, TURNING)),
        tables, starts, lengths, partial, logarithms, scale * LOG2_E, tokens, batch, tables.shape[1], first,
        HEADS=heads, BLOCK=block, SPLIT=shares > 1, SEQUENCES=max(128, triton.next_power_of_2(batch + 1)), num_warps=4,
    )  # fmt: skip
    if shares > 1:
        combine(partial, logarithms, out.view(-1, rank))
    return out


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_tile(tile, starts, lengths, T, B, HEADS: gl.constexpr, SEQUENCES: gl.constexpr):
    """paged_context.find_tile."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    sequence = gl.arange(0, SEQUENCES, layout=LANES)
    first = gl.load(starts + sequence, mask=sequence <= B, other=T)
    after = gl.load(starts + sequence + 1, mask=sequence < B, other=T)
    tiles = gl.cdiv((after - first) * HEADS, 64)
    ends = gl.associative_scan(tiles, 0, _add)
    mine = gl.sum((ends <= tile).to(gl.int32), 0)
    is_mine = sequence == mine
    start = gl.sum(gl.where(is_mine, first, 0), 0)
    count = gl.sum(gl.where(is_mine, after - first, 0), 0)
    length = gl.load(lengths + mine, mask=mine < B, other=0)
    return mine, start, count, length, (tile - gl.sum(gl.where(is_mine, ends - tiles, 0), 0)) * 64


@gluon.jit
def _produce(
    latent_rows, turning_rows, latent_keys, turning_keys, tables, left_query, right_query, turning_query, left_ring,
    right_ring, turning_ring, query_full, full, empty, row, table, low, high, BLOCK: gl.constexpr,
):  # fmt: skip
    if low < high:
        mbarrier.expect(query_full, 64 * 576 * 2)
        tma.async_copy_global_to_shared(latent_rows, [row, 0], query_full, left_query)
        tma.async_copy_global_to_shared(latent_rows, [row, 256], query_full, right_query)
        tma.async_copy_global_to_shared(turning_rows, [row, 512], query_full, turning_query)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for key in range(low, high, 64):
        at = gl.load(tables + table + key // BLOCK) * BLOCK + key % BLOCK
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, 64 * 576 * 2)
        tma.async_copy_global_to_shared(latent_keys, [at, 0], ready, left_ring.index(stage))
        tma.async_copy_global_to_shared(latent_keys, [at, 256], ready, right_ring.index(stage))
        tma.async_copy_global_to_shared(turning_keys, [at, 512], ready, turning_ring.index(stage))
        stage, phase = next_stage(stage, phase, 2)


@gluon.jit
def _clear_past_the_end(latents, rows):
    """Zeros the stage's rows from `rows` on: what lies behind a sequence's last key may not be a number."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, WIDE))
    for first in gl.static_range(0, 64, 8):
        if first + 8 > rows:
            part = latents.slice(first, 8, dim=0)
            values = part.load(WIDE)
            gl.thread_barrier()
            part.store(gl.where((first + row < rows)[:, None], values, 0.0).to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _store(result, partial, row_at, row, rows, COLUMN: gl.constexpr, LAYOUT: gl.constexpr):
    column = COLUMN + gl.arange(0, 256, layout=gl.SliceLayout(0, LAYOUT))
    at = partial + (row_at + row).to(gl.int64)[:, None] * 512 + column[None, :]
    gl.store(at, result.to(partial.dtype.element_ty), mask=(row < rows)[:, None])


@gluon.jit
def _score(
    left_query, right_query, turning_query, left_ring, right_ring, turning_ring, weights_buffer, factors_buffer,
    query_full, full, empty, weights_full, weights_empty, partial, logarithms, scale, row_at, output_at, rows, first,
    count, length, low, high, first_key, writes, HEADS: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
    seen = gl.minimum(length - count + 1 + (first + row) // HEADS, high)
    largest = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    scores = gl.zeros([64, 64], gl.float32, SCORES)  # always overwritten; carried so that its registers are reused
    result = gl.zeros([64, 256], gl.float32, RESULT)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    if low < high:
        mbarrier.wait(query_full, 0)
    for key in range(low, high, 64):
        mbarrier.wait(full.index(stage), phase)
        scores = warpgroup_mma(left_query, left_ring.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(right_query, right_ring.index(stage).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma(turning_query, turning_ring.index(stage).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        position = key + column
        visible = (position[None, :] < seen[:, None]) & (position >= first_key)[None, :]
        masked = gl.where(visible, scores * scale, -float("inf"))
        new = gl.maximum(largest, gl.max(masked, 1))
        finite = gl.where(new == -float("inf"), 0.0, new)
        factor = gl.exp2(largest - finite)
        weights = gl.exp2(masked - finite[:, None])
        total = total * factor + gl.sum(weights, 1)
        largest = new
        rounded = weights.to(gl.bfloat16)
        mbarrier.wait(weights_empty, turn ^ 1)
        weights_buffer.store(rounded)
        factors_buffer.store(factor)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(weights_full, count=1)
        turn ^= 1
        latents = left_ring.index(stage)
        if key + 64 > length:
            _clear_past_the_end(latents, length - key)
        result *= gl.convert_layout(factor, gl.SliceLayout(1, RESULT))[:, None]
        result = warpgroup_mma(gl.convert_layout(rounded, WEIGHTS), latents, result, is_async=True)
        result = warpgroup_mma_wait(0, deps=(result,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, 2)
    nothing = total == 0.0
    inverse = 1.0 / gl.where(nothing, 1.0, total)
    mbarrier.wait(weights_empty, turn ^ 1)
    factors_buffer.store(inverse)
    gl.thread_barrier()
    mbarrier.arrive(weights_full, count=1)
    if writes > 0:
        result *= gl.convert_layout(inverse, gl.SliceLayout(1, RESULT))[:, None]
        result_row = gl.arange(0, 64, layout=gl.SliceLayout(1, RESULT))
        _store(result, partial, output_at, result_row, rows, 0, RESULT)
    logarithm = gl.where(nothing, -float("inf"), largest + gl.log2(gl.where(nothing, 1.0, total)))
    gl.store(logarithms + output_at + row, logarithm, mask=row < rows)


@gluon.jit
def _weigh(
    right_ring, weights_buffer, factors_buffer, full, empty, weights_full, weights_empty, partial, output_at, rows,
    length, low, high, writes,
):  # fmt: skip
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, RESULT))
    result = gl.zeros([64, 256], gl.float32, RESULT)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for key in range(low, high, 64):
        mbarrier.wait(full.index(stage), phase)
        latents = right_ring.index(stage)
        if key + 64 > length:
            _clear_past_the_end(latents, length - key)
        mbarrier.wait(weights_full, turn)
        turn ^= 1
        result *= factors_buffer.load(gl.SliceLayout(1, RESULT))[:, None]
        result = warpgroup_mma(weights_buffer, latents, result, is_async=True)
        result = warpgroup_mma_wait(0, deps=(result,))
        gl.thread_barrier()
        mbarrier.arrive(weights_empty, count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, 2)
    mbarrier.wait(weights_full, turn)
    if writes > 0:
        result *= factors_buffer.load(gl.SliceLayout(1, RESULT))[:, None]
        _store(result, partial, output_at, row, rows, 256, RESULT)


@gluon.jit(do_not_specialize=["T", "B", "max_blocks", "first_key"])
def _kernel(
    latent_rows, turning_rows, latent_keys, turning_keys, tables, starts, lengths, partial, logarithms, scale, T, B,
    max_blocks, first_key, HEADS: gl.constexpr, BLOCK: gl.constexpr, SPLIT: gl.constexpr, SEQUENCES: gl.constexpr,
):  # fmt: skip
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    left_query = gl.allocate_shared_memory(gl.bfloat16, [64, 256], latent_rows.layout)
    right_query = gl.allocate_shared_memory(gl.bfloat16, [64, 256], latent_rows.layout)
    turning_query = gl.allocate_shared_memory(gl.bfloat16, [64, 64], turning_rows.layout)
    left_ring = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], latent_keys.layout)
    right_ring = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], latent_keys.layout)
    turning_ring = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], turning_keys.layout)
    weights_buffer = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WEIGHTS)
    factors_buffer = gl.allocate_shared_memory(gl.float32, [64], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both consumers
    mbarrier.init(query_full, count=1)
    mbarrier.init(weights_full, count=1)
    mbarrier.init(weights_empty, count=1)
    fence_async_shared()
    sequence, start, count, length, first = _find_tile(gl.program_id(0), starts, lengths, T, B, HEADS, SEQUENCES)
    size = gl.cdiv(gl.cdiv(length, gl.num_programs(1)), 64) * 64
    low = gl.program_id(1) * size
    seen = gl.minimum(length - count + 1 + (first + 63) // HEADS, length)
    high = gl.minimum(low + size, seen)
    row_at = start * HEADS + first
    output_at = row_at + gl.program_id(1) * T * HEADS
    rows = count * HEADS - first
    writes = gl.to_tensor(1)
    if SPLIT:
        writes = (low < high).to(gl.int32)
    gl.warp_specialize([
        (_score, (left_query, right_query, turning_query, left_ring, right_ring, turning_ring, weights_buffer,
                  factors_buffer, query_full, full, empty, weights_full, weights_empty, partial, logarithms, scale,
                  row_at, output_at, rows, first, count, length, low, high, first_key, writes, HEADS)),
        (_weigh, (right_ring, weights_buffer, factors_buffer, full, empty, weights_full, weights_empty, partial,
                  output_at, rows, length, low, high, writes)),
        (_produce, (latent_rows, turning_rows, latent_keys, turning_keys, tables, left_query, right_query,
                    turning_query, left_ring, right_ring, turning_ring, query_full, full, empty, row_at,
                    sequence * max_blocks, low, high, BLOCK)),
    ], [4, 1], [232, 40])  # fmt: skip

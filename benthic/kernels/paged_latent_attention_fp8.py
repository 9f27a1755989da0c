"""Latent attention over a paged cache whose latents are e4m3: 656 bytes a token of DeepSeek's widths instead of 1,152.

A row of the pool is bytes: C latents in e4m3, R rotated channels in bfloat16, one float32 factor that gives the latents
back (the largest of them over 448), 12 bytes of nothing so that rows begin at 16 bytes. Rotated channels keep their
precision, because a position's angle has none to spare. The factor of a key belongs to a column of scores: it
multiplies scores and softmax weights, never the latents, and e4m3 becomes bfloat16 without loss on its way in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.cache_write import angles, channels_of_pairs, require_rows, turn_heads
from benthic.kernels.paged_context import (
    LOG2_E,
    combine,
    find_tile,
    padded,
    require_paged,
    share_bounds,
    shares_of_context,
    softmax_end,
    softmax_step,
    tile_count,
    tile_rows,
)

TAIL = 16
"""Bytes of a row behind its channels: the factor, and what fills up to 16."""
STEPS = {16: (32, 4, 5), 32: (32, 8, 5), 64: (64, 8, 3)}
"""Rows of a tile to (keys of a step, warps, stages). Under 64 rows the pipeline loads no e4m3 ahead (Triton 3.6: two
operand layouts of one narrow load), so two programs share a multiprocessor and wait in turn."""


def absorbed_paged_attention_fp8(
    query: Tensor,
    pool: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    rank: int,
    first: int = 0,
) -> Tensor:
    """absorbed_paged_attention over pool uint8 [blocks, block, C + 2R + 16], query [T, H, C + R] bfloat16."""
    require_paged(query, pool, tables, starts, lengths, torch.uint8)
    tokens, heads, width = query.shape
    batch, block, row_bytes = len(lengths), pool.shape[1], pool.shape[2]
    if row_bytes != rank + 2 * (width - rank) + TAIL or row_bytes % 16:
        raise ValueError(
            f"a row of the pool is {row_bytes} bytes; latents of {rank} and {width - rank} rotated channels need "
            f"{rank + 2 * (width - rank) + TAIL}, a multiple of 16"
        )
    out = query.new_empty((tokens, heads, rank))
    if not tokens:
        return out
    rows = tile_rows(tokens, batch, heads)
    tiles = tile_count(tokens, batch, heads, rows)
    keys, warps, stages = STEPS[rows]
    shares = shares_of_context(tiles, tables.shape[1] * block, keys, query.device, resident=1 if rows == 64 else 2)
    partial = out.new_empty((shares, tokens * heads, rank), dtype=torch.float32) if shares > 1 else out
    logarithms = out.new_empty((shares, tokens * heads), dtype=torch.float32)
    _share[(tiles, shares)](
        query, pool.view(torch.float8_e4m3fn), pool.view(query.dtype), pool.view(torch.float32), tables, starts,
        lengths, partial, logarithms, scale * LOG2_E, tokens, batch, tables.shape[1], first,
        HEADS=heads, RANK=rank, TURNING=width - rank, BLOCK=block, SPLIT=shares > 1, ROWS=rows, KEYS=keys,
        RANK_PADDED=padded(rank), TURNING_PADDED=padded(width - rank), SEQUENCES=triton.next_power_of_2(batch + 1),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if shares > 1:
        combine(partial, logarithms, out.view(-1, rank))
    return out


def write_latents_fp8(
    projected: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    interleaved: bool,
) -> None:
    """cache_write.write_latents into such a pool."""
    turn_and_write_latents_fp8(projected[:, None, :0], projected, weight, eps, rotations, positions, slots, pool,
                               projected[:, None, :0], interleaved)  # fmt: skip


def turn_and_write_latents_fp8(
    query: Tensor,
    projected: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    absorbed: Tensor,
    interleaved: bool,
) -> None:
    """cache_write.turn_and_write_latents into such a pool."""
    (tokens, width), rank, pairs = projected.shape, len(weight), rotations.shape[1]
    require_rows(projected, rotations, positions, slots, pool, torch.uint8)
    if rank + 2 * pairs != width or pool.shape[2] != rank + 4 * pairs + TAIL:
        raise ValueError(
            f"{width} columns were projected, {rank} of them latents, with {pairs} rotations; a row of the pool is "
            f"{pool.shape[2]} bytes"
        )
    heads = query.shape[1] if query.shape[2] else 0
    if tokens:
        _write[(tokens,)](
            query, projected, weight, torch.view_as_real(rotations), positions, slots, pool.view(torch.float8_e4m3fn),
            pool.view(projected.dtype), pool.view(torch.float32), absorbed, eps, projected.stride(0), query.stride(0),
            query.stride(1), query.shape[2] - 2 * pairs, absorbed.stride(0), absorbed.stride(1), RANK=rank,
            RANK_PADDED=padded(rank), PAIRS=pairs, PAIRS_PADDED=padded(pairs), HEADS=heads,
            HEADS_PADDED=triton.next_power_of_2(max(heads, 1)), INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip


@triton.jit
def _write(
    query, projected, weight, rotations, positions, slots, latents, channels, factors, absorbed, eps, projected_token,
    query_token, query_head, query_first, absorbed_token, absorbed_head, RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr, PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = RANK + 4 * PAIRS + 16
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)
    cos, sin = angles(rotations, tl.load(positions + token).to(tl.int64), pair, PAIRS)
    one, other = channels_of_pairs(pair, PAIRS, INTERLEAVED)
    if slot >= 0:
        c = tl.arange(0, RANK_PADDED)
        latent = tl.load(projected + token * projected_token + c, mask=c < RANK, other=0.0).to(tl.float32)
        gain = tl.load(weight + c, mask=c < RANK, other=0.0).to(tl.float32)
        latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / RANK + eps) * gain
        largest = tl.max(tl.abs(latent), 0)
        factor = tl.where(largest == 0.0, 1.0, tl.maximum(largest * (1.0 / 448.0), 1.1754943508222875e-38))
        tl.store(latents + slot * BYTES + c, (latent / factor).to(tl.float8e4nv), mask=c < RANK)
        tl.store(factors + slot * (BYTES // 4) + (RANK + 4 * PAIRS) // 4, factor)
        turn_heads(projected + token * projected_token + RANK, channels + slot * (BYTES // 2) + RANK // 2, cos, sin,
                   one, other, pair < PAIRS, 0, 0, 1, 1)  # fmt: skip
    if HEADS > 0:
        turn_heads(query + token * query_token + query_first, absorbed + token * absorbed_token + RANK, cos, sin,
                   one, other, pair < PAIRS, query_head, absorbed_head, HEADS, HEADS_PADDED)  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "max_blocks", "first_key"])
def _share(
    query, latents, channels, factors, tables, starts, lengths, partial, logarithms, scale, T, B, max_blocks,
    first_key, HEADS: tl.constexpr, RANK: tl.constexpr, TURNING: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, RANK_PADDED: tl.constexpr,
    TURNING_PADDED: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + TURNING
    BYTES: tl.constexpr = RANK + 2 * TURNING + 16
    share = tl.program_id(1)
    sequence, start, count, length, first = find_tile(tl.program_id(0), starts, lengths, T, B, HEADS, ROWS, SEQUENCES)
    if first < count * HEADS:
        row = first + tl.arange(0, ROWS)
        real = row < count * HEADS
        row_at = (start * HEADS + row).to(tl.int64)
        seen = length - count + 1 + row // HEADS  # keys that the row sees
        c = tl.arange(0, RANK_PADDED)
        r = tl.arange(0, TURNING_PADDED)
        query_at = query + row_at[:, None] * WIDTH
        latent_query = tl.load(query_at + c[None, :], mask=real[:, None] & (c < RANK)[None, :], other=0.0)
        turning_query = tl.load(query_at + RANK + r[None, :], mask=real[:, None] & (r < TURNING)[None, :], other=0.0)
        low, high = share_bounds(share, first_key, length, length - count + 1 + (first + ROWS - 1) // HEADS, KEYS)
        largest = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, RANK_PADDED), tl.float32)
        for key in range(low, high, KEYS):
            position = key + tl.arange(0, KEYS)
            inside = position < high
            block = tl.load(tables + sequence * max_blocks + position // BLOCK, mask=inside, other=0)
            slot = block.to(tl.int64) * BLOCK + position % BLOCK
            latent_at = latents + slot[:, None] * BYTES + c[None, :]
            turning_at = channels + slot[:, None] * (BYTES // 2) + RANK // 2 + r[None, :]
            latent = tl.load(latent_at, mask=inside[:, None] & (c < RANK)[None, :], other=0.0).to(
                query.dtype.element_ty
            )
            turning = tl.load(turning_at, mask=inside[:, None] & (r < TURNING)[None, :], other=0.0)
            factor = tl.load(factors + slot * (BYTES // 4) + (RANK + 2 * TURNING) // 4, mask=inside, other=0.0)
            scores = tl.dot(latent_query, tl.trans(latent)) * factor[None, :]
            scores = tl.dot(turning_query, tl.trans(turning), scores) * scale  # [ROWS, KEYS]
            scores = tl.where(position[None, :] < tl.minimum(seen, high)[:, None], scores, -float("inf"))
            weights, shrink, largest, total = softmax_step(scores, largest, total)
            result = tl.dot((weights * factor[None, :]).to(latent.dtype), latent, result * shrink[:, None])
        result, logarithm = softmax_end(result, largest, total)
        if SPLIT:
            row_at += share * T * HEADS
            tl.store(logarithms + row_at, logarithm, mask=real)
        if (not SPLIT) | (high > low):
            at = partial + row_at[:, None] * RANK + c[None, :]
            tl.store(at, result.to(partial.dtype.element_ty), mask=real[:, None] & (c < RANK)[None, :])

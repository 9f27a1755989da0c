"""Latent attention over a paged cache: absorbed queries of all heads read one latent row a key (arXiv:2405.04434).

A row of the pool is 2 (C + R) bytes and serves as key (whole) and as value (its first C numbers). With few heads its
bytes set the pace, with 128 heads the tensor cores: 2 H (2 C + R) operations a row and query position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import paged_latent_attention_hopper as hopper
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

STEPS = {16: (32, 4, 5), 32: (32, 8, 5), 64: (64, 8, 3)}
"""Rows of a tile to (keys of a step, warps, stages). A key's address comes from the table, a load that the pipeline
counts as a stage of its own: 3 stages keep one step of keys in flight, 5 keep two. Nothing spills at 512 + 64."""


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
    """query [T, H, C + R] over pool [blocks, block, C + R] -> [T, H, C] (`rank` is C), in query's dtype.

    Sequence b owns query rows starts[b] to starts[b + 1] (int32 [B + 1]) and has lengths[b] keys (int32 [B]) with
    those rows' own; its key p is row p % block of block tables[b, p // block] (int32 [B, max_blocks]). Of n rows, row
    i sees keys `first` to lengths[b] - n + i. A row that sees none, and rows from starts[B] on, are zeros. The host
    never waits for the device.
    """
    implementation = hopper.absorbed_paged_attention if hopper.suits(query, pool, rank) else in_triton
    return implementation(query, pool, tables, starts, lengths, scale, rank, first)


def in_triton(
    query: Tensor,
    pool: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    rank: int,
    first: int = 0,
) -> Tensor:
    """absorbed_paged_attention for any widths, blocks and GPU that holds a step's keys in shared memory."""
    tokens, heads, width = query.shape
    batch, block = len(lengths), pool.shape[1]
    require_paged(query, pool, tables, starts, lengths)
    if pool.shape[2] != width:
        raise ValueError(f"a row of the pool holds {pool.shape[2]} numbers, a query {width}")
    out = query.new_empty((tokens, heads, rank))
    if not tokens:
        return out
    rows = tile_rows(tokens, batch, heads)
    tiles = tile_count(tokens, batch, heads, rows)
    keys, warps, stages = STEPS[rows]
    shares = shares_of_context(tiles, tables.shape[1] * block, keys, query.device)
    partial = out.new_empty((shares, tokens * heads, rank), dtype=torch.float32) if shares > 1 else out
    logarithms = out.new_empty((shares, tokens * heads), dtype=torch.float32)
    _share[(tiles, shares)](
        query, pool, tables, starts, lengths, partial, logarithms, scale * LOG2_E, tokens, batch,
        tables.shape[1], first, HEADS=heads, RANK=rank, TURNING=width - rank, BLOCK=block, SPLIT=shares > 1,
        ROWS=rows, KEYS=keys, RANK_PADDED=padded(rank), TURNING_PADDED=padded(width - rank),
        SEQUENCES=triton.next_power_of_2(batch + 1), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if shares > 1:
        combine(partial, logarithms, out.view(-1, rank))
    return out


@triton.jit(do_not_specialize=["T", "B", "max_blocks", "first_key"])
def _share(
    query, pool, tables, starts, lengths, partial, logarithms, scale, T, B, max_blocks, first_key,
    HEADS: tl.constexpr, RANK: tl.constexpr, TURNING: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, RANK_PADDED: tl.constexpr, TURNING_PADDED: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + TURNING
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
            key_at = pool + (block.to(tl.int64) * BLOCK + position % BLOCK)[:, None] * WIDTH
            latent = tl.load(key_at + c[None, :], mask=inside[:, None] & (c < RANK)[None, :], other=0.0)
            turning = tl.load(key_at + RANK + r[None, :], mask=inside[:, None] & (r < TURNING)[None, :], other=0.0)
            scores = tl.dot(latent_query, tl.trans(latent))
            scores = tl.dot(turning_query, tl.trans(turning), scores) * scale  # [ROWS, KEYS]
            scores = tl.where(position[None, :] < tl.minimum(seen, high)[:, None], scores, -float("inf"))
            weights, shrink, largest, total = softmax_step(scores, largest, total)
            result = tl.dot(weights.to(latent.dtype), latent, result * shrink[:, None])
        result, logarithm = softmax_end(result, largest, total)
        if SPLIT:
            row_at += share * T * HEADS
            tl.store(logarithms + row_at, logarithm, mask=real)
        if (not SPLIT) | (high > low):
            at = partial + row_at[:, None] * RANK + c[None, :]
            tl.store(at, result.to(partial.dtype.element_ty), mask=real[:, None] & (c < RANK)[None, :])

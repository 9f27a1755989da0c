"""Attention over a paged cache of keys and values: MHA, GQA and MQA (arXiv:2305.13245).

A row of the pool is the keys [Hk, Dq], then the values [Hk, Dv] of one position. The H / Hk query heads of a key head
share a tile, so that its keys and values are read once for all of them; their bytes set the pace of decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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

KEYS = 64


def paged_attention(
    query: Tensor,
    pool: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    key_heads: int,
    first: int = 0,
) -> Tensor:
    """query [T, H, Dq] over pool [blocks, block, Hk (Dq + Dv)] -> [T, H, Dv], in query's dtype.

    Query head h reads key head h // (H / Hk). Sequences, tables and what a row sees: absorbed_paged_attention.
    """
    require_paged(query, pool, tables, starts, lengths)
    tokens, heads, width = query.shape
    batch, block, value_width = len(lengths), pool.shape[1], pool.shape[2] // key_heads - width
    if heads % key_heads or pool.shape[2] % key_heads or value_width < 1:
        raise ValueError(f"{heads} query heads of {width} and rows of {pool.shape[2]} do not fit {key_heads} key heads")
    out = query.new_empty((tokens, heads, value_width))
    if not tokens:
        return out
    group = heads // key_heads
    rows = tile_rows(tokens, batch, group)
    tiles = tile_count(tokens, batch, group, rows)
    shares = shares_of_context(tiles * key_heads, tables.shape[1] * block, KEYS, query.device)
    partial = out.new_empty((shares, tokens * heads, value_width), dtype=torch.float32) if shares > 1 else out
    logarithms = out.new_empty((shares, tokens * heads), dtype=torch.float32)
    _share[(tiles, shares, key_heads)](
        query, pool, tables, starts, lengths, partial, logarithms, scale * LOG2_E, tokens, batch,
        tables.shape[1], first, KEY_HEADS=key_heads, GROUP=group, WIDTH=width, VALUE_WIDTH=value_width, BLOCK=block,
        SPLIT=shares > 1, ROWS=rows, KEYS=KEYS, PADDED=padded(width), VALUE_PADDED=padded(value_width),
        SEQUENCES=triton.next_power_of_2(batch + 1), num_warps=4, num_stages=5,
    )  # fmt: skip
    if shares > 1:
        combine(partial, logarithms, out.view(-1, value_width))
    return out


@triton.jit(do_not_specialize=["T", "B", "max_blocks", "first_key"])
def _share(
    query, pool, tables, starts, lengths, partial, logarithms, scale, T, B, max_blocks, first_key,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    POOL_ROW: tl.constexpr = KEY_HEADS * (WIDTH + VALUE_WIDTH)
    share = tl.program_id(1)
    key_head = tl.program_id(2)
    sequence, start, count, length, first = find_tile(tl.program_id(0), starts, lengths, T, B, GROUP, ROWS, SEQUENCES)
    if first < count * GROUP:
        row = first + tl.arange(0, ROWS)
        real = row < count * GROUP
        row_at = ((start + row // GROUP) * HEADS + key_head * GROUP + row % GROUP).to(tl.int64)
        seen = length - count + 1 + row // GROUP  # keys that the row sees
        d = tl.arange(0, PADDED)
        v = tl.arange(0, VALUE_PADDED)
        queries = tl.load(
            query + row_at[:, None] * WIDTH + d[None, :], mask=real[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        low, high = share_bounds(share, first_key, length, length - count + 1 + (first + ROWS - 1) // GROUP, KEYS)
        largest = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, VALUE_PADDED), tl.float32)
        for key in range(low, high, KEYS):
            position = key + tl.arange(0, KEYS)
            inside = position < high
            block = tl.load(tables + sequence * max_blocks + position // BLOCK, mask=inside, other=0)
            key_at = pool + (block.to(tl.int64) * BLOCK + position % BLOCK)[:, None] * POOL_ROW + key_head * WIDTH
            value_at = key_at + (KEY_HEADS * WIDTH + key_head * (VALUE_WIDTH - WIDTH))
            keys = tl.load(key_at + d[None, :], mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)
            scores = tl.dot(queries, tl.trans(keys)) * scale  # [ROWS, KEYS]
            scores = tl.where(position[None, :] < tl.minimum(seen, high)[:, None], scores, -float("inf"))
            weights, shrink, largest, total = softmax_step(scores, largest, total)
            values = tl.load(value_at + v[None, :], mask=inside[:, None] & (v < VALUE_WIDTH)[None, :], other=0.0)
            result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None])
        result, logarithm = softmax_end(result, largest, total)
        if SPLIT:
            row_at += share * T * HEADS
            tl.store(logarithms + row_at, logarithm, mask=real)
        if (not SPLIT) | (high > low):
            at = partial + row_at[:, None] * VALUE_WIDTH + v[None, :]
            tl.store(at, result.to(partial.dtype.element_ty), mask=real[:, None] & (v < VALUE_WIDTH)[None, :])

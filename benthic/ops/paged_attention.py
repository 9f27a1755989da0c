"""Attention over rows that lie in blocks of a pool: several sequences of different lengths in one call.

The rows of sequence b fill the blocks of `tables[b]` in order. A call brings query rows `starts[b]` .. `starts[b + 1]`
of each sequence; `lengths[b]` keys are there once the rows of these positions are written, so that with n query rows
row i sees keys `first` .. lengths[b] - n + i. Query rows from the last start on belong to no sequence.
References: numerics/reference/paged_latent_attention.py and paged_attention.py. No gradients.

What lies behind a sequence's last key is never read, or taken as zeros: a hidden row is weighted by 0, and 0 x NaN is
NaN, which a block's owner before may have left. Entries of a table behind a sequence's last block are any valid block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64, Shaped
from torch import Tensor

from benthic.numerics.reference.paged_latent_attention_fp8 import unpack


def write_rows(
    pool: Shaped[Tensor, "blocks block width"], rows: Shaped[Tensor, "tokens width"], slots: Int64[Tensor, " tokens"]
) -> None:
    """Store `rows` in the pool; slot s is row s % block of block s // block. Negative ones, which come
    last, are written nowhere."""
    if len(slots) and int(slots[-1]) < 0:
        kept = slots >= 0
        rows, slots = rows[kept], slots[kept]
    pool.view(-1, pool.shape[-1]).index_copy_(0, slots, rows)


def gather_rows(
    pool: Shaped[Tensor, "blocks block width"], tables: Int32[Tensor, "sequences max_blocks"], length: int
) -> Shaped[Tensor, "sequences {length} width"]:
    """The first `length` rows of each sequence; beyond a sequence's own length they are whatever its blocks hold."""
    blocks = -(-length // pool.shape[1])
    if len(tables) == 1 and not tables.is_cuda:
        mine = tables[0, :blocks].tolist()
        if mine == list(range(mine[0], mine[0] + blocks)):
            # Neighbours, as blocks of a lone sequence mostly are: nothing to copy.
            return pool.view(-1, pool.shape[-1])[mine[0] * pool.shape[1] :][:length][None]
    rows = pool.index_select(0, tables[:, :blocks].flatten())
    return rows.view(len(tables), -1, pool.shape[-1])[:, :length]


def gather_latents(
    pool: Shaped[Tensor, "blocks block row"],
    tables: Int32[Tensor, "sequences max_blocks"],
    length: int,
    rank: int,
    dtype: torch.dtype,
) -> Float[Tensor, "sequences {length} latent_and_rotary"]:
    """gather_rows of latents [C] with their rotated keys [R], as numbers of `dtype` where the pool holds bytes."""
    rows = gather_rows(pool, tables, length)
    return unpack(rows, rank, dtype).to(dtype) if rows.dtype == torch.uint8 else rows


def absorbed_paged_attention(
    query: Float[Tensor, "tokens heads latent_and_rotary"],
    pool: Shaped[Tensor, "blocks block row"],
    tables: Int32[Tensor, "sequences max_blocks"],
    starts: Int32[Tensor, " sequences+1"],
    lengths: Int32[Tensor, " sequences"],
    scale: float,
    rank: int,
    first: int = 0,
) -> Float[Tensor, "tokens heads {rank}"]:
    """Latent attention of queries that were moved into the latent space and rotated (DeepSeek-V2, section 2.1.2).

    A row of the pool is a latent [C], then a rotated key [R], or their bytes where the latent is kept in FP8
    (numerics/reference/paged_latent_attention_fp8.py); the result is a latent for each head.
    """
    if query.is_cuda and pool.dtype == torch.uint8:
        from benthic.kernels import paged_latent_attention_fp8

        where = (pool, tables, starts, lengths)
        return paged_latent_attention_fp8.absorbed_paged_attention_fp8(query, *where, scale, rank, first)
    if query.is_cuda:
        from benthic.kernels import paged_latent_attention as kernel

        return kernel.absorbed_paged_attention(query, pool, tables, starts, lengths, scale, rank, first)
    parts = []
    for part, rows, count, totals in _alike(starts, lengths):
        keys = _known_rows(pool, tables[part], totals)[:, first:]  # [b, L, C + R]
        if keys.dtype == torch.uint8:
            keys = unpack(keys, rank, query.dtype).type_as(query)
        queries = query[rows].view(len(keys), -1, query.shape[-1])  # [b, n H, C + R]
        scores = torch.bmm(queries, keys.transpose(1, 2)).float() * scale  # [b, n H, L]
        mask = _visible(lengths[part] - first, count, keys.shape[1])
        if mask is not None:
            scores = scores.view(len(keys), count, -1, keys.shape[1]).masked_fill_(~mask[:, :, None], -torch.inf)
            scores = scores.view(len(keys), -1, keys.shape[1])
        weights = scores.softmax(-1).type_as(keys)
        parts.append(torch.bmm(weights, keys[..., :rank]).view(-1, query.shape[1], rank))
    return _whole(parts, query)


def paged_attention(
    query: Float[Tensor, "tokens heads key_width"],
    pool: Float[Tensor, "blocks block keys_and_values"],
    tables: Int32[Tensor, "sequences max_blocks"],
    starts: Int32[Tensor, " sequences+1"],
    lengths: Int32[Tensor, " sequences"],
    scale: float,
    key_heads: int,
    first: int = 0,
) -> Float[Tensor, "tokens heads value_width"]:
    """Attention with keys and values of their own: a row of the pool is keys [Hk, Dq], then values [Hk, Dv].

    Query head h reads key head h // (H / Hk).
    """
    if query.is_cuda:
        from benthic.kernels import paged_attention as kernel

        return kernel.paged_attention(query, pool, tables, starts, lengths, scale, key_heads, first)
    heads, width = query.shape[1:]
    parts = []
    for part, rows, count, totals in _alike(starts, lengths):
        stored = _known_rows(pool, tables[part], totals)[:, first:]
        key, value = stored.split_with_sizes((key_heads * width, stored.shape[-1] - key_heads * width), -1)
        mask = _visible(lengths[part] - first, count, stored.shape[1])
        out = F.scaled_dot_product_attention(
            query[rows].view(len(stored), count, heads, width).transpose(1, 2),
            key.unflatten(-1, (key_heads, -1)).transpose(1, 2),
            value.unflatten(-1, (key_heads, -1)).transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None],
            scale=scale,
            enable_gqa=heads != key_heads,
        )  # [b, H, n, Dv]
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return _whole(parts, query)


def _known_rows(pool: Tensor, tables: Tensor, totals: list[int]) -> Tensor:
    """gather_rows up to the longest of sequences, zeros behind the others' last."""
    longest = max(totals)
    rows = gather_rows(pool, tables, longest)
    for index, total in enumerate(totals):
        if total < longest:
            rows[index, total:] = 0
    return rows


def _whole(parts: list[Tensor], query: Tensor) -> Tensor:
    """The results of all query rows; those of no sequence, which come last, are zeros."""
    missing = len(query) - sum(map(len, parts))
    if missing:
        parts.append(query.new_zeros(missing, *parts[0].shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _alike(starts: Tensor, lengths: Tensor) -> Iterator[tuple[slice, slice, int, list[int]]]:
    """Neighbouring sequences with equally many query rows: which they are, their rows, how many each has, and the keys
    of each."""
    bounds, totals = starts.tolist(), lengths.tolist()
    begin = 0
    for end in range(1, len(totals) + 1):
        count = bounds[begin + 1] - bounds[begin]
        if end == len(totals) or bounds[end + 1] - bounds[end] != count:
            if count:
                yield slice(begin, end), slice(bounds[begin], bounds[end]), count, totals[begin:end]
            begin = end


def _visible(
    lengths: Int32[Tensor, " sequences"], count: int, longest: int
) -> Bool[Tensor, "sequences {count} {longest}"] | None:
    """Keys each query row sees; None where it is all of them."""
    if count == 1 and len(lengths) == 1:
        return None
    last = lengths[:, None] - count + torch.arange(count, device=lengths.device)  # [b, n]
    return torch.arange(longest, device=lengths.device) <= last[..., None]

"""Attention over a paged cache of keys and values, one sequence after another."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int32
from torch import Tensor


def paged_attention(
    query: Float[Tensor, "tokens heads key_width"],
    pool: Float[Tensor, "blocks block keys_and_values"],
    tables: Int32[Tensor, "batch max_blocks"],
    starts: Int32[Tensor, " batch+1"],
    lengths: Int32[Tensor, " batch"],
    scale: float,
    key_heads: int,
    first: int = 0,
) -> Float[Tensor, "tokens heads value_width"]:
    """A row of the pool is keys [Hk, Dq], then values [Hk, Dv]; query head h reads key head h // (H / Hk).

    Query rows starts[b] to starts[b + 1] of sequence b, the last of its lengths[b] keys; row i of n sees keys `first`
    to lengths[b] - n + i. Rows that see none are zeros.
    """
    heads, width = query.shape[1:]
    out = query.new_zeros(len(query), heads, pool.shape[2] // key_heads - width)
    for table, (start, end), length in zip(tables.tolist(), pairwise(starts.tolist()), lengths.tolist(), strict=True):
        rows = pool[table].flatten(0, 1)[:length].float()  # [L, Hk (Dq + Dv)]
        keys, values = rows.split_with_sizes((key_heads * width, rows.shape[1] - key_heads * width), 1)
        keys = keys.unflatten(1, (key_heads, -1)).repeat_interleave(heads // key_heads, 1)  # [L, H, Dq]
        values = values.unflatten(1, (key_heads, -1)).repeat_interleave(heads // key_heads, 1)
        for token in range(start, end):
            seen = slice(first, max(first, length - end + token + 1))
            if len(keys[seen]):
                scores = torch.einsum("hd,lhd->hl", query[token].float(), keys[seen]) * scale
                out[token] = torch.einsum("hl,lhv->hv", scores.softmax(-1), values[seen]).type_as(out)
    return out

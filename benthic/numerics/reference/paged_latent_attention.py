"""Absorbed latent attention over a paged cache, one sequence after another (arXiv:2405.04434, section 2.1.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int32
from torch import Tensor


def absorbed_paged_attention(
    query: Float[Tensor, "tokens heads width"],
    pool: Float[Tensor, "blocks block width"],
    tables: Int32[Tensor, "batch max_blocks"],
    starts: Int32[Tensor, " batch+1"],
    lengths: Int32[Tensor, " batch"],
    scale: float,
    rank: int,
    first: int = 0,
) -> Float[Tensor, "tokens heads {rank}"]:
    """Query rows starts[b] to starts[b + 1] of sequence b, the last of its lengths[b] keys; row i of n sees keys
    `first` to lengths[b] - n + i. Rows that see none are zeros."""
    out = torch.zeros_like(query[..., :rank])
    for table, (start, end), length in zip(tables.tolist(), pairwise(starts.tolist()), lengths.tolist(), strict=True):
        rows = pool[table].flatten(0, 1)[:length].float()  # [L, C + R]
        for token in range(start, end):
            seen = rows[first : max(first, length - end + token + 1)]
            if len(seen):
                weights = (query[token].float() @ seen.T * scale).softmax(-1)  # [H, L]
                out[token] = (weights @ seen[:, :rank]).type_as(out)
    return out

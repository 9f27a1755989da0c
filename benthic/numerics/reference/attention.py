"""Softmax attention, with expanded keys and values (naive) and on the latents themselves (absorbed)."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(length: int, documents: Tensor | None = None) -> Tensor:
    """Which keys a query sees: itself and those before it, within its document: bool [1 or B, S, S]."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if documents is None:
        return causal
    return causal & (documents[:, :, None] == documents[:, None, :])


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """`query` [B, S, H, Dq], `key` [B, L, Hk, Dq], `value` [B, L, Hk, Dv], `mask` [B or 1, S, L]: [B, S, H, Dv].
    Query head h reads key head h // (H / Hk)."""
    shared = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def absorbed_attention(
    query: Tensor, rotary_query: Tensor, latents: Tensor, expansion: Tensor, scale: float, mask: Tensor
) -> Tensor:
    """The same, for latent attention (DeepSeek-V2, section 2.1.2): [B, S, H, V].

    `query` [B, S, H, N], `rotary_query` [B, S, H, R], `latents` [B, L, C + R], `expansion` [H, N + V, C] = W_UK over
    W_UV. q . (W_UK c) = (W_UK^T q) . c, and W_UV leaves the sum over keys.
    """
    width, rank = query.shape[-1], expansion.shape[-1]
    key_rows, value_rows = expansion[:, :width], expansion[:, width:]
    latent, rotary_key = latents[..., :rank], latents[..., rank:]
    moved = torch.einsum("bqhn,hnc->bqhc", query, key_rows)
    scores = torch.einsum("bqhc,bkc->bhqk", moved, latent) + torch.einsum("bqhr,bkr->bhqk", rotary_query, rotary_key)
    weights = (scores * scale).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    context = torch.einsum("bhqk,bkc->bqhc", weights, latent)
    return torch.einsum("bqhc,hvc->bqhv", context, value_rows)

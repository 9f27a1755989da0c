"""Softmax attention, with expanded keys and values (naive) and on the latents themselves (absorbed)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def visible(
    length: int, documents: Int64[Tensor, "batch positions"] | None = None
) -> Bool[Tensor, "batch_or_1 positions positions"]:
    """Which keys a query sees: itself and those before it, within its document."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if documents is None:
        return causal
    return causal & (documents[:, :, None] == documents[:, None, :])


def attention(
    query: Float[Tensor, "batch positions heads key_width"],
    key: Float[Tensor, "batch keys key_heads key_width"],
    value: Float[Tensor, "batch keys key_heads value_width"],
    scale: float,
    mask: Bool[Tensor, "#batch positions keys"],
) -> Float[Tensor, "batch positions heads value_width"]:
    """Softmax of scaled query-key products, over values. Query head h reads key head h // (heads / key_heads)."""
    shared = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def absorbed_attention(
    query: Float[Tensor, "batch positions heads no_position"],
    rotary_query: Float[Tensor, "batch positions heads rotary"],
    latents: Float[Tensor, "batch keys latent_and_rotary"],
    expansion: Float[Tensor, "heads no_position_and_value latent_and_rotary-rotary"],
    scale: float,
    mask: Bool[Tensor, "#batch positions keys"],
) -> Float[Tensor, "batch positions heads no_position_and_value-no_position"]:
    """The same, for latent attention (DeepSeek-V2, section 2.1.2).

    A row of `latents` is a latent [C], then a rotated key [R]; `expansion` [H, N + V, C] is W_UK over W_UV.
    q . (W_UK c) = (W_UK^T q) . c, and W_UV leaves the sum over keys.
    """
    width, rank = query.shape[-1], expansion.shape[-1]
    key_rows, value_rows = expansion[:, :width], expansion[:, width:]
    latent, rotary_key = latents[..., :rank], latents[..., rank:]
    moved = torch.einsum("bqhn,hnc->bqhc", query, key_rows)
    scores = torch.einsum("bqhc,bkc->bhqk", moved, latent) + torch.einsum("bqhr,bkr->bhqk", rotary_query, rotary_key)
    weights = (scores * scale).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    context = torch.einsum("bhqk,bkc->bqhc", weights, latent)
    return torch.einsum("bqhc,hvc->bqhv", context, value_rows)

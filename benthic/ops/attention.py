"""Softmax attention, expanded and absorbed. Reference: numerics/reference/attention.py.

A mask is bool [B or 1, S, L], True where a query may look; None means causal over keys of the same sequence.

Both run in torch's fused attention, which chooses by itself: on Hopper cuDNN's kernels come first (torch 2.11 and later
with cuDNN 9.15.1 or later), and they alone take MLA's 192 channels of keys beside 128 of values without padding. They
read any strides with contiguous channels, so heads are transposed views and values a slice, and they return gradients
that lie as [B, S, H, D]: nothing is copied on the way in or out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def attention(
    query: Float[Tensor, "batch positions heads key_width"],
    key: Float[Tensor, "batch keys key_heads key_width"],
    value: Float[Tensor, "batch keys key_heads value_width"],
    scale: float,
    mask: Bool[Tensor, "#batch positions keys"] | None = None,
) -> Float[Tensor, "batch positions heads value_width"]:
    """Softmax of scaled query-key products, over values.

    Key heads Hk divide heads H; query head h reads key head h // (H / Hk). Without a mask, positions S are the last of
    the keys' L, and each sees all keys up to its own.
    """
    length, keys = query.shape[1], key.shape[1]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H, S, Dq]
    width = value.shape[-1]
    # Says so without an array: kernels skip what is not seen.
    later = mask is None and 1 < length < keys
    if width < query.shape[-1] and (later or query.device.type == "cpu"):
        # The processor's fused kernel takes one width for all three, and so does flash, the only fast one of a GPU that
        # knows late queries. Padding costs less than the S x L scores of the plain path, or the slower kernel.
        value = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_last_positions(length, keys) if later else None if mask is None else mask[:, None],
        is_causal=mask is None and length > 1 and not later,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)[..., :width]


def _last_positions(length: int, keys: int) -> Tensor:
    """Each of the last `length` of `keys` positions sees those up to its own; no array is made."""
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler along, a second of start-up

    return causal_lower_right(length, keys)


def absorbed_attention(
    query: Float[Tensor, "batch positions heads no_position"],
    rotary_query: Float[Tensor, "batch positions heads rotary"],
    latents: Float[Tensor, "batch keys latent_and_rotary"],
    expansion: Float[Tensor, "heads no_position_and_value latent_and_rotary-rotary"],
    scale: float,
    mask: Bool[Tensor, "#batch positions keys"] | None = None,
) -> Float[Tensor, "batch positions heads no_position_and_value-no_position"]:
    """Latent attention that never expands keys or values (DeepSeek-V2, section 2.1.2).

    A row of `latents` is a latent [C], then a rotated key [R]; `expansion` [H, N + V, C] holds kv_b_proj's rows of
    each head. Costs 2 H (C + R) + 2 H C operations a query-key pair instead of 2 H (N + R + V), and reads C + R
    numbers a key instead of H (N + R + V).
    """
    batch, length, heads, width = query.shape
    rank = expansion.shape[-1]
    key_rows, value_rows = expansion[:, :width], expansion[:, width:]
    # [H, B S, N] @ [H, N, C] -> [B, S, H, C]
    moved = torch.bmm(query.permute(2, 0, 1, 3).reshape(heads, -1, width), key_rows)
    moved = moved.view(heads, batch, length, rank).permute(1, 2, 0, 3)
    moved = torch.cat((moved, rotary_query), -1).view(batch, length * heads, -1)  # [B, S H, C + R]
    scores = torch.bmm(moved, latents.transpose(1, 2)).float() * scale  # [B, S H, L]
    if mask is not None:
        scores = scores.view(batch, length, heads, -1).masked_fill(~mask[:, :, None], -torch.inf).view_as(scores)
    weights = scores.softmax(-1).type_as(latents)
    context = torch.bmm(weights, latents[..., :rank])  # [B, S H, C]
    context = context.view(-1, heads, rank).transpose(0, 1)  # [H, B S, C]
    values = torch.bmm(context, value_rows.transpose(1, 2))  # [H, B S, V]
    return values.transpose(0, 1).reshape(batch, length, heads, -1)


def causal_mask(start: int, length: int, device: torch.device) -> Bool[Tensor, "1 {length} {start}+{length}"] | None:
    """Keys that queries start .. start + length may see among start + length; None where `attention` knows by
    itself."""
    if start == 0 or length == 1:
        return None
    keys = torch.arange(start + length, device=device)
    return (keys <= keys[start:, None])[None]


def document_mask(
    documents: Int64[Tensor, "batch keys"], queries: Int64[Tensor, " positions"] | None = None
) -> Bool[Tensor, "batch positions keys"]:
    """Causal, and within one document: which keys a query sees, from document numbers. `queries` are the positions
    asked for, all by default."""
    keys = torch.arange(documents.shape[1], device=documents.device)
    queries = keys if queries is None else queries
    same = documents[:, queries, None] == documents[:, None, :]
    return same & (keys <= queries[:, None])

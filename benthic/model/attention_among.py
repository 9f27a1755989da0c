"""Latent attention of a part of a sequence's positions, the rest of which other processes have: latents travel, C + R
numbers a token, and each process expands them all by itself (docs/scaling.md says when that is best)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from benthic import ops
from benthic.ops.recomputation import cheap
from benthic.parallel.context import whole
from benthic.parallel.sequence import Share

if TYPE_CHECKING:
    from benthic.model.attention import LatentAttention, Span


def attention_among(
    layer: LatentAttention,
    query: Float[Tensor, "batch positions heads key_width"],
    latent: Float[Tensor, "batch positions latent"],
    key: Float[Tensor, "batch positions rotary"],
    span: Span,
    share: Share,
) -> Float[Tensor, "batch positions heads value_width"]:
    """Values of this process's positions, from its queries, latents and keys, which are not turned yet."""
    query, turning = query.split_with_sizes((layer.key_width, layer.rotary_width), -1)
    turned = ops.rotary(torch.cat((turning, key[:, :, None]), 2), span.rotations, layer.interleaved)
    rotary_query, rotary_key = turned.split_with_sizes((layer.heads, 1), 2)  # [B, S / c, H, R], [B, S / c, 1, R]
    rows = whole(torch.cat((latent, rotary_key[:, :, 0]), -1), share)
    latent, rotary_key = rows.split_with_sizes((layer.rank, layer.rotary_width), -1)  # [B, S, C], [B, S, R]
    expanded = layer.kv_b_proj(latent).unflatten(-1, (layer.heads, -1))
    own, value = expanded.split_with_sizes((layer.key_width, layer.value_width), -1)
    key = _keys(own, rotary_key)  # [B, S, H, N + R]
    query, parts, first = torch.cat((query, rotary_query), -1), [], 0
    for stretch in share.stretches:
        mine, seen = slice(first, first + len(stretch)), stretch.stop
        mask = None if span.mask is None else span.mask[:, mine, :seen]
        parts.append(ops.attention(query[:, mine], key[:, :seen], value[:, :seen], layer.scale, mask))
        first = mine.stop
    return torch.cat(parts, 1)


@cheap
def _keys(own: Tensor, rotary_key: Tensor) -> Tensor:
    """Each head's own channels and the rotated ones that heads share. They are those of the whole sequence on every
    process, and may be dropped (memory.recomputation), as what `kv_b_proj` expands may."""
    return torch.cat((own, rotary_key[:, :, None].expand(-1, -1, own.shape[2], -1)), -1)

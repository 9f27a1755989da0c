"""Latents of a paged cache in e4m3: how a row is packed, in plain torch, and attention over what it gives back."""

from __future__ import annotations

import torch
from jaxtyping import Complex64, Float, Float32, Int, Int32, UInt8
from torch import Tensor

from benthic.numerics.reference.cache_write import turn_queries, write_latents
from benthic.numerics.reference.paged_latent_attention import absorbed_paged_attention


def pack(rows: Float[Tensor, "*rows width"], rank: int) -> UInt8[Tensor, "*rows bytes"]:
    """Latents [C] in e4m3, rotated channels [R] in rows' dtype, the factor max |latent| / 448 in float32, 12 zeros."""
    latent = rows[..., :rank].float()
    largest = latent.abs().amax(-1, keepdim=True)
    factor = torch.where(largest == 0, 1.0, (largest * (1 / 448)).clamp(min=2.0**-126))
    parts = (latent / factor).to(torch.float8_e4m3fn), rows[..., rank:].contiguous(), factor, torch.zeros_like(factor)
    return torch.cat([part.view(torch.uint8) for part in (*parts, *parts[3:], *parts[3:])], -1)


def unpack(pool: UInt8[Tensor, "*rows bytes"], rank: int, dtype: torch.dtype) -> Float32[Tensor, "*rows width"]:
    """Rows [C + R] that packed ones give back; rotated channels were stored in `dtype`."""
    channels, end = pool.shape[-1] - rank - 16, pool.shape[-1]
    factor = pool[..., end - 16 : end - 12].contiguous().view(torch.float32)
    latent = pool[..., :rank].contiguous().view(torch.float8_e4m3fn).float() * factor
    return torch.cat((latent, pool[..., rank : rank + channels].contiguous().view(dtype).float()), -1)


def absorbed_paged_attention_fp8(
    query: Float[Tensor, "tokens heads width"],
    pool: UInt8[Tensor, "blocks block bytes"],
    tables: Int32[Tensor, "batch max_blocks"],
    starts: Int32[Tensor, " batch+1"],
    lengths: Int32[Tensor, " batch"],
    scale: float,
    rank: int,
    first: int = 0,
) -> Float[Tensor, "tokens heads {rank}"]:
    """absorbed_paged_attention over unpacked rows."""
    rows = unpack(pool, rank, query.dtype)
    return absorbed_paged_attention(query.float(), rows, tables, starts, lengths, scale, rank, first).type_as(query)


def turn_and_write_latents_fp8(
    query: Float[Tensor, "tokens heads query_width"],
    projected: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " rank"],
    eps: float,
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: UInt8[Tensor, "blocks block bytes"],
    absorbed: Float[Tensor, "tokens heads width"],
    interleaved: bool,
) -> None:
    """write_latents_fp8, and the query's last channels, turned, to the last ones of `absorbed`."""
    write_latents_fp8(projected, weight, eps, rotations, positions, slots, pool, interleaved)
    turn_queries(query, rotations, positions, absorbed, interleaved)


def write_latents_fp8(
    projected: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " rank"],
    eps: float,
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: UInt8[Tensor, "blocks block bytes"],
    interleaved: bool,
) -> None:
    """write_latents, its rows packed; the latent is not rounded before."""
    kept = slots[slots >= 0].long()
    plain = projected.new_zeros((*pool.shape[:2], projected.shape[1]), dtype=torch.float32)
    write_latents(projected, weight, eps, rotations, positions, slots, plain, interleaved)
    rows = plain.view(-1, projected.shape[1])[kept]
    rank = len(weight)
    packed = pack(rows, rank)[:, :rank], rows[:, rank:].to(projected.dtype).view(torch.uint8), pack(rows, rank)[:, -16:]
    pool.view(-1, pool.shape[2])[kept] = torch.cat(packed, 1)

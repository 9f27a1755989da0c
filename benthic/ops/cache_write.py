"""What a token leaves in a paged cache. Reference: numerics/reference/cache_write.py.

On a GPU a layer's new rows take one launch, the queries' rotation included. On the processor queries and keys turn
together. No gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex64, Float, Int, Shaped
from torch import Tensor

from benthic.numerics.reference.paged_latent_attention_fp8 import pack
from benthic.ops.norm import rms_norm
from benthic.ops.paged_attention import write_rows
from benthic.ops.rotary import rotary


def turn_and_write_latents(
    query: Float[Tensor, "tokens heads query_width"],
    projected: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " rank"],
    eps: float,
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: Shaped[Tensor, "blocks block row"],
    absorbed: Float[Tensor, "tokens heads width"],
    interleaved: bool,
) -> None:
    """Stores kv_a's output `projected` [T, C + R] in the pool, and the queries' last R channels, turned, in `absorbed`.

    A row is the latent, normalised with `weight` [C], and the key, turned by rotations[positions[t]]; it goes to slot
    slots[t] (row slot % block of block slot // block), nowhere if that is negative. The first C channels of `absorbed`
    stay as they are: they are a matrix product's. A pool of bytes takes rows as `pack` makes them
    (numerics/reference/paged_latent_attention_fp8.py).
    """
    in_float8 = pool.dtype == torch.uint8
    if projected.is_cuda and in_float8:
        from benthic.kernels import paged_latent_attention_fp8

        paged_latent_attention_fp8.turn_and_write_latents_fp8(
            query, projected, weight, eps, rotations, positions, slots, pool, absorbed, interleaved
        )
        return
    if projected.is_cuda:
        from benthic.kernels import cache_write

        cache_write.turn_and_write_latents(
            query, projected, weight, eps, rotations, positions, slots, pool, absorbed, interleaved
        )
        return
    rank, heads = len(weight), query.shape[1]
    table = rotations.index_select(0, positions)
    both = torch.cat((query[..., query.shape[2] - 2 * table.shape[1] :], projected[:, None, rank:]), 1)
    turned = rotary(both[None], table, interleaved)[0]  # [T, H + 1, R]
    absorbed[..., rank:] = turned[:, :heads]
    rows = torch.cat((rms_norm(projected[:, :rank], weight, eps), turned[:, heads]), -1)
    write_rows(pool, pack(rows, rank) if in_float8 else rows, slots)


def turn_and_write_keys(
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens key_heads width"],
    value: Float[Tensor, "tokens key_heads value_width"],
    rotations: Complex64[Tensor, "positions width//2"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: Float[Tensor, "blocks block row"],
    interleaved: bool,
) -> Float[Tensor, "tokens heads width"]:
    """The queries turned; keys turned, then values, stored in the pool's slots as turn_and_write_latents has it."""
    if query.is_cuda:
        from benthic.kernels import cache_write

        return cache_write.turn_and_write_keys(query, key, value, rotations, positions, slots, pool, interleaved)
    heads, table = query.shape[1], rotations.index_select(0, positions)
    turned = rotary(torch.cat((query, key), 1)[None], table, interleaved)[0]  # [T, H + Hk, Dq]
    write_rows(pool, torch.cat((turned[:, heads:].flatten(1), value.flatten(1)), -1), slots)
    return turned[:, :heads]

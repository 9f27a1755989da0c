"""What a token leaves in a paged cache, in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Complex64, Float, Int
from torch import Tensor

from benthic.numerics.reference.norm import rms_norm
from benthic.numerics.reference.rotary import rotary


def write_latents(
    projected: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " rank"],
    eps: float,
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: Float[Tensor, "blocks block width"],
    interleaved: bool,
) -> None:
    """Row t of `projected`, its latent normalised and its key turned, to row slots[t] of the pool; none if negative."""
    latent, key = projected.float().split_with_sizes((len(weight), projected.shape[1] - len(weight)), 1)
    latent = rms_norm(latent, weight.float(), eps)
    key = _turned(key[:, None], rotations, positions, interleaved)[:, 0]
    kept = slots >= 0
    pool.view(-1, pool.shape[2])[slots[kept].long()] = torch.cat((latent, key), 1)[kept].type_as(pool)


def turn_and_write_latents(
    query: Float[Tensor, "tokens heads query_width"],
    projected: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " rank"],
    eps: float,
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    slots: Int[Tensor, " tokens"],
    pool: Float[Tensor, "blocks block width"],
    absorbed: Float[Tensor, "tokens heads width"],
    interleaved: bool,
) -> None:
    """write_latents, and the query's last channels, turned, to the last ones of `absorbed`."""
    write_latents(projected, weight, eps, rotations, positions, slots, pool, interleaved)
    turn_queries(query, rotations, positions, absorbed, interleaved)


def turn_queries(
    query: Float[Tensor, "tokens heads query_width"],
    rotations: Complex64[Tensor, "positions pairs"],
    positions: Int[Tensor, " tokens"],
    absorbed: Float[Tensor, "tokens heads width"],
    interleaved: bool,
) -> None:
    """The last R channels of each query, turned, to the last R of `absorbed`."""
    turning = 2 * rotations.shape[1]
    turned = _turned(query[..., query.shape[2] - turning :].float(), rotations, positions, interleaved)
    absorbed[..., absorbed.shape[2] - turning :] = turned.type_as(absorbed)


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
    """The query turned; keys turned, then values, to row slots[t] of the pool."""
    rows = torch.cat((_turned(key.float(), rotations, positions, interleaved).flatten(1), value.float().flatten(1)), 1)
    kept = slots >= 0
    pool.view(-1, pool.shape[2])[slots[kept].long()] = rows[kept].type_as(pool)
    return _turned(query.float(), rotations, positions, interleaved).type_as(query)


def _turned(x: Tensor, rotations: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    table = rotations[positions.long()]  # [T, R / 2]
    return rotary(x, table.real, table.imag, interleaved)

"""What a token leaves in a paged cache. Reference: numerics/reference/cache_write.py, also the processor's path.

On a GPU a layer's new rows take one launch, the queries' rotation included. No gradients.
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Complex64, Float, Int
from torch import Tensor


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
    """Stores kv_a's output `projected` [T, C + R] in the pool, and the queries' last R channels, turned, in `absorbed`.

    A row is the latent, normalised with `weight` [C], and the key, turned by rotations[positions[t]]; it goes to slot
    slots[t] (row slot % block of block slot // block), nowhere if that is negative. The first C channels of `absorbed`
    stay as they are: they are a matrix product's.
    """
    _implementation(projected).turn_and_write_latents(
        query, projected, weight, eps, rotations, positions, slots, pool, absorbed, interleaved
    )


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
    return _implementation(query).turn_and_write_keys(query, key, value, rotations, positions, slots, pool, interleaved)


def _implementation(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from benthic.kernels import cache_write
    else:
        from benthic.numerics.reference import cache_write
    return cache_write

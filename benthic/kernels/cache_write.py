"""What a token leaves in the cache, written in one pass: key rotated, latent normalised, row stored where it belongs.

The queries of the same tokens turn by the same angles, so they turn in the same launch: at batch 1 a launch costs as
much as the bytes do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.paged_context import padded


def write_latents(
    projected: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    interleaved: bool,
) -> None:
    """Stores a row of `pool` [blocks, block, C + R] for each row of kv_a's output `projected` [T, C + R].

    Its first C numbers, divided by their root mean square (`eps`) and times `weight` [C], are the latent; the others
    are the key, turned by rotations[positions[t]] (complex64 [P, R / 2]; pairs (2i, 2i + 1) if `interleaved`, else
    (i, i + R / 2)). Row t goes to slot slots[t], row slot % block of block slot // block; a negative slot is skipped.
    """
    turn_and_write_latents(projected[:, None, :0], projected, weight, eps, rotations, positions, slots, pool,
                           projected[:, None, :0], interleaved)  # fmt: skip


def turn_and_write_latents(
    query: Tensor,
    projected: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    absorbed: Tensor,
    interleaved: bool,
) -> None:
    """write_latents, and the last R channels of query [T, H, N + R], turned, to the last R of absorbed [T, H, C + R].

    `absorbed` is left as it is elsewhere: its first C channels are a matrix product's.
    """
    tokens, width = projected.shape
    rank, pairs = len(weight), rotations.shape[1]
    if rank + 2 * pairs != width or pool.shape[2] != width:
        raise ValueError(
            f"{width} columns were projected; {rank} weights and {pairs} rotations need {rank + 2 * pairs}, "
            f"and a row of the pool holds {pool.shape[2]}"
        )
    require_rows(projected, rotations, positions, slots, pool)
    heads = query.shape[1] if query.shape[2] else 0
    if tokens:
        _latents[(tokens,)](
            query, projected, weight, torch.view_as_real(rotations), positions, slots, pool, absorbed, eps,
            projected.stride(0), query.stride(0), query.stride(1), query.shape[2] - 2 * pairs,
            absorbed.stride(0), absorbed.stride(1), RANK=rank, RANK_PADDED=padded(rank),
            PAIRS=pairs, PAIRS_PADDED=padded(pairs), HEADS=heads, HEADS_PADDED=triton.next_power_of_2(max(heads, 1)),
            INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip


def turn_and_write_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    interleaved: bool,
) -> Tensor:
    """query [T, H, D], turned, as a new tensor; key [T, Hk, D], turned, and value [T, Hk, Dv] stored in `pool`
    [blocks, block, Hk (D + Dv)]. Rotations complex64 [P, D / 2], positions and slots: write_latents."""
    tokens, heads, width = query.shape
    key_heads, value_width = value.shape[1:]
    pairs = rotations.shape[1]
    if pool.shape[2] != key_heads * (width + value_width) or 2 * pairs != width or key.shape[1:] != (key_heads, width):
        raise ValueError(
            f"keys {list(key.shape)}, values {list(value.shape)}, queries {list(query.shape)} and {pairs} rotations "
            f"do not fit rows of {pool.shape[2]}"
        )
    require_rows(query, rotations, positions, slots, pool)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.stride(1) != width:
            raise ValueError(f"heads of {name} must follow each other, not be {tensor.stride(1)} elements apart")
    turned = query.new_empty(query.shape)
    if tokens:
        _keys[(tokens,)](
            query, key, value.contiguous(), torch.view_as_real(rotations), positions, slots, pool, turned,
            query.stride(0), key.stride(0), PAIRS=pairs, PAIRS_PADDED=padded(pairs), HEADS=heads, KEY_HEADS=key_heads,
            HEADS_PADDED=triton.next_power_of_2(heads), KEY_HEADS_PADDED=triton.next_power_of_2(key_heads),
            VALUES=key_heads * value_width, VALUES_PADDED=triton.next_power_of_2(key_heads * value_width),
            INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip
    return turned


def require_rows(
    rows: Tensor,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    stored: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless what is written fits how it is addressed; `stored` is the pool's dtype, the rows' if
    None."""
    for name, tensor in (("rotations", rotations), ("positions", positions), ("slots", slots), ("pool", pool)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    if rows.stride(-1) != 1 or pool.dtype != (stored or rows.dtype):
        raise ValueError(f"rows of {rows.dtype} with strides {rows.stride()} do not go into a pool of {pool.dtype}")
    if rotations.dtype != torch.complex64:
        raise ValueError(f"rotations must be torch.complex64, not {rotations.dtype}")


@triton.jit
def angles(rotations, position, pair, PAIRS: tl.constexpr):
    at = rotations + (position * PAIRS + pair) * 2
    return tl.load(at, mask=pair < PAIRS, other=0.0), tl.load(at + 1, mask=pair < PAIRS, other=0.0)


@triton.jit
def channels_of_pairs(pair, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels of a pair, after each other's order."""
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + PAIRS
    return first, second


@triton.jit
def turn_heads(
    source, target, cos, sin, first, second, inside, SOURCE_HEAD, TARGET_HEAD, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
):  # fmt: skip
    """Turns `first` and `second` channels of HEADS heads, SOURCE_HEAD and TARGET_HEAD elements apart."""
    head = tl.arange(0, HEADS_PADDED)
    inside = (head < HEADS)[:, None] & inside[None, :]
    a = tl.load(source + head[:, None] * SOURCE_HEAD + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + head[:, None] * SOURCE_HEAD + second[None, :], mask=inside, other=0.0).to(tl.float32)
    left = a * cos[None, :] - b * sin[None, :]
    right = b * cos[None, :] + a * sin[None, :]
    at = target + head[:, None] * TARGET_HEAD
    tl.store(at + first[None, :], left.to(target.dtype.element_ty), mask=inside)
    tl.store(at + second[None, :], right.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _latents(
    query, projected, weight, rotations, positions, slots, pool, absorbed, eps, projected_token, query_token,
    query_head, query_first, absorbed_token, absorbed_head, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + 2 * PAIRS
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)
    cos, sin = angles(rotations, position, pair, PAIRS)
    first, second = channels_of_pairs(pair, PAIRS, INTERLEAVED)
    if slot >= 0:
        c = tl.arange(0, RANK_PADDED)
        latent = tl.load(projected + token * projected_token + c, mask=c < RANK, other=0.0).to(tl.float32)
        scale = tl.load(weight + c, mask=c < RANK, other=0.0).to(tl.float32)
        latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / RANK + eps) * scale
        tl.store(pool + slot * WIDTH + c, latent.to(pool.dtype.element_ty), mask=c < RANK)
        turn_heads(projected + token * projected_token + RANK, pool + slot * WIDTH + RANK, cos, sin, first, second,
                    pair < PAIRS, 0, 0, 1, 1)  # fmt: skip
    if HEADS > 0:
        turn_heads(query + token * query_token + query_first, absorbed + token * absorbed_token + RANK, cos, sin,
                    first, second, pair < PAIRS, query_head, absorbed_head, HEADS, HEADS_PADDED)  # fmt: skip


@triton.jit
def _keys(
    query, key, value, rotations, positions, slots, pool, turned, query_token, key_token, PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    KEY_HEADS_PADDED: tl.constexpr, VALUES: tl.constexpr, VALUES_PADDED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * PAIRS
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)
    cos, sin = angles(rotations, position, pair, PAIRS)
    first, second = channels_of_pairs(pair, PAIRS, INTERLEAVED)
    turn_heads(query + token * query_token, turned + token * HEADS * WIDTH, cos, sin, first, second, pair < PAIRS,
                WIDTH, WIDTH, HEADS, HEADS_PADDED)  # fmt: skip
    if slot >= 0:
        row = pool + slot * (KEY_HEADS * WIDTH + VALUES)
        turn_heads(key + token * key_token, row, cos, sin, first, second, pair < PAIRS, WIDTH, WIDTH, KEY_HEADS,
                    KEY_HEADS_PADDED)  # fmt: skip
        v = tl.arange(0, VALUES_PADDED)
        values = tl.load(value + token * VALUES + v, mask=v < VALUES, other=0.0)
        tl.store(row + KEY_HEADS * WIDTH + v, values, mask=v < VALUES)

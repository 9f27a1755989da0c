"""Heads of latent attention out of its projections (DeepSeek-V2, section 2.1), forward and backward.

What a product with the weights leaves is not yet what attention reads: a head's query has to be turned in its last R
channels, and its key put together from N channels of its own and R turned ones that all heads share. A program does
both for some heads of one token, reading and writing each number once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.rotary import load_pairs, load_rotation, store_pairs, tile, turn


def latent_heads(
    query: Tensor, expanded: Tensor, rotary_key: Tensor, rotations: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """query [B, S, H, N + R], expanded [B, S, H, N + V] and rotary_key [B, S, R], of any strides with contiguous
    channels, and rotations complex64 [S, R / 2] -> (query turned, key), both contiguous [B, S, H, N + R].

    Values need no work: they stay the last V channels of `expanded`.
    """
    batch, positions, heads, width = query.shape
    turned, key = query.new_empty(query.shape), query.new_empty(query.shape)
    if query.numel():
        constants = _constants(heads, width, rotary_key.shape[2], interleaved)
        _forward[(positions, batch, triton.cdiv(heads, constants["HEADS"]))](
            query, expanded, rotary_key, torch.view_as_real(rotations.contiguous()), turned, key, heads,
            *query.stride()[:3], *expanded.stride()[:3], *rotary_key.stride()[:2], **constants,
        )  # fmt: skip
    return turned, key


def latent_heads_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, rotations: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key [B, S, H, N + R] and of value [B, S, H, V], of any strides with contiguous channels
    -> those of query [B, S, H, N + R], expanded [B, S, H, N + V] and rotary_key [B, S, R], all contiguous.

    rotary_key's is summed over heads in float32, always in the same order.
    """
    batch, positions, heads, width = grad_query.shape
    rotary_width, value_width = 2 * rotations.shape[1], grad_value.shape[3]
    query = grad_query.new_empty(grad_query.shape)
    expanded = grad_query.new_empty((batch, positions, heads, width - rotary_width + value_width))
    rotary_key = grad_query.new_empty((batch, positions, rotary_width))
    if query.numel():
        _backward[(positions, batch)](
            grad_query, grad_key, grad_value, torch.view_as_real(rotations.contiguous()), query, expanded, rotary_key,
            *grad_query.stride()[:3], *grad_key.stride()[:3], *grad_value.stride()[:3],
            H=heads, V=value_width, VALUES=triton.next_power_of_2(value_width),
            **_constants(heads, width, rotary_width, interleaved),
        )  # fmt: skip
    return query, expanded, rotary_key


def _constants(heads: int, width: int, rotary_width: int, interleaved: bool) -> dict[str, int | bool]:
    """N own channels, padded to OWN; R / 2 pairs, padded to BLOCK; HEADS heads a program."""
    own, pairs = width - rotary_width, rotary_width // 2
    together, warps = tile(heads, width)
    return {
        "N": own, "OWN": triton.next_power_of_2(own), "PAIRS": pairs, "BLOCK": triton.next_power_of_2(pairs),
        "HEADS": together, "INTERLEAVED": interleaved, "num_warps": warps,
    }  # fmt: skip


@triton.jit
def _forward(
    query, expanded, rotary_key, rotations, turned, key, H,
    query_batch, query_position, query_head, expanded_batch, expanded_position, expanded_head, key_batch, key_position,
    N: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    position, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = sequence * tl.num_programs(0) + position
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)  # heads may be the outermost dimension
    c = tl.arange(0, OWN)[None, :]
    own = (h < H) & (c < N)
    query += sequence * query_batch + position * query_position + h * query_head
    expanded += sequence * expanded_batch + position * expanded_position + h * expanded_head
    rotary_key += sequence * key_batch + position * key_position
    out = (token * H + h) * (N + 2 * PAIRS)

    plain_query = tl.load(query + c, mask=own, other=0.0)
    plain_key = tl.load(expanded + c, mask=own, other=0.0)
    first, second = load_pairs(query + N, h < H, PAIRS, BLOCK, HEADS, INTERLEAVED)
    shared_first, shared_second = load_pairs(rotary_key, position >= 0, PAIRS, BLOCK, 1, INTERLEAVED)
    cosine, sine = load_rotation(rotations, position, PAIRS, BLOCK, False)

    tl.store(turned + out + c, plain_query, mask=own)
    tl.store(key + out + c, plain_key, mask=own)
    first, second = turn(first, second, cosine, sine)
    store_pairs(turned + out + N, first, second, h < H, PAIRS, BLOCK, HEADS, INTERLEAVED)
    shared_first, shared_second = turn(shared_first, shared_second, cosine, sine)
    first, second = tl.broadcast_to(shared_first, (HEADS, BLOCK)), tl.broadcast_to(shared_second, (HEADS, BLOCK))
    store_pairs(key + out + N, first, second, h < H, PAIRS, BLOCK, HEADS, INTERLEAVED)


@triton.jit
def _backward(
    grad_query, grad_key, grad_value, rotations, query, expanded, rotary_key,
    query_batch, query_position, query_head, key_batch, key_position, key_head,
    value_batch, value_position, value_head,
    H: tl.constexpr, V: tl.constexpr, VALUES: tl.constexpr,
    N: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    position, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = sequence * tl.num_programs(0) + position
    grad_query += sequence * query_batch + position * query_position
    grad_key += sequence * key_batch + position * key_position
    grad_value += sequence * value_batch + position * value_position
    cosine, sine = load_rotation(rotations, position, PAIRS, BLOCK, True)
    first_sum, second_sum = tl.zeros((HEADS, BLOCK), tl.float32), tl.zeros((HEADS, BLOCK), tl.float32)
    c, v = tl.arange(0, OWN)[None, :], tl.arange(0, VALUES)[None, :]
    for start in range(0, H, HEADS):  # one program a token, so that the sum over heads has one order
        h = start + tl.arange(0, HEADS)[:, None].to(tl.int64)
        inside = h < H
        own, valued = inside & (c < N), inside & (v < V)
        plain_query = tl.load(grad_query + h * query_head + c, mask=own, other=0.0)
        plain_key = tl.load(grad_key + h * key_head + c, mask=own, other=0.0)
        value = tl.load(grad_value + h * value_head + v, mask=valued, other=0.0)
        first, second = load_pairs(grad_query + h * query_head + N, inside, PAIRS, BLOCK, HEADS, INTERLEAVED)
        key_first, key_second = load_pairs(grad_key + h * key_head + N, inside, PAIRS, BLOCK, HEADS, INTERLEAVED)

        out_query = query + (token * H + h) * (N + 2 * PAIRS)
        out_expanded = expanded + (token * H + h) * (N + V)
        tl.store(out_query + c, plain_query, mask=own)
        tl.store(out_expanded + c, plain_key, mask=own)
        tl.store(out_expanded + N + v, value, mask=valued)
        first, second = turn(first, second, cosine, sine)
        store_pairs(out_query + N, first, second, inside, PAIRS, BLOCK, HEADS, INTERLEAVED)
        first_sum += key_first
        second_sum += key_second
    first, second = tl.sum(first_sum, 0)[None, :], tl.sum(second_sum, 0)[None, :]
    first, second = turn(first, second, cosine, sine)
    out = rotary_key + token * (2 * PAIRS)
    store_pairs(out, first, second, position >= 0, PAIRS, BLOCK, 1, INTERLEAVED)

"""What the paged attention kernels share: which query rows a tile holds, splitting a context, and putting it together.

A tile is up to ROWS query rows (positions x heads) of one sequence, so that a key is read once for all of them. A
context is split into equal shares, each a program of its own; every share leaves a normalised result and the logarithm
of its softmax's denominator, and `combine` weighs them in a fixed order. Grids follow from shapes alone: a program
that finds nothing to do ends, so that a captured graph serves any lengths.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


def tile_rows(tokens: int, batch: int, heads: int) -> int:
    """Rows of a tile, 16, 32 or 64: what a sequence brings on average. 64 rows are what wgmma multiplies at once."""
    rows = triton.cdiv(tokens, max(batch, 1)) * heads
    return min(64, max(16, triton.next_power_of_2(rows)))


def tile_count(tokens: int, batch: int, heads: int, rows: int) -> int:
    """Tiles that `find_tile` may need. Sequence b begins at tile starts[b] * heads // rows + b, so that no tile
    number depends on other sequences' lengths; tokens behind the last sequence count as one more."""
    return tokens * heads // rows + batch + 1


def shares_of_context(programs: int, longest: int, keys: int, device: torch.device) -> int:
    """Into how many shares to cut contexts of up to `longest` keys, so that `programs` tiles fill the device.

    The fewest shares within 10% of the best use of its multiprocessors: more of them cost more to combine.
    """
    most = max(1, min(triton.cdiv(longest, keys), 128))
    places = multiprocessors(device)
    if programs >= 4 * places:
        return 1
    used = [programs * shares / (triton.cdiv(programs * shares, places) * places) for shares in range(1, most + 1)]
    return next(shares for shares, share_used in enumerate(used, 1) if share_used >= 0.9 * max(used))


def padded(width: int) -> int:
    """The power of two that `width` numbers are computed in; 16 is the least that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def require_paged(query: Tensor, pool: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Raises ValueError unless tensors are contiguous, numbers int32, and query and pool of one dtype."""
    for name, tensor in (("query", query), ("pool", pool), ("tables", tables)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    for name, tensor in (("tables", tables), ("starts", starts), ("lengths", lengths)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be torch.int32, not {tensor.dtype}")
    if pool.dtype != query.dtype:
        raise ValueError(f"the pool holds {pool.dtype}, the query {query.dtype}")


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 elsewhere, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def combine(partial: Tensor, logarithms: Tensor, out: Tensor) -> Tensor:
    """out[row] = sum_s softmax_s(logarithms[s, row]) * partial[s, row], zeros where all logarithms are -inf.

    partial float32 [shares, rows, width], logarithms (base 2) float32 [shares, rows], out [rows, width], returned.
    A partial whose logarithm is -inf is never read.
    """
    shares, rows, width = partial.shape
    block = min(128, triton.next_power_of_2(width))
    if rows:
        _combine[(rows, triton.cdiv(width, block))](
            partial, logarithms, out, rows, shares, WIDTH=width, BLOCK=block, SHARES=16, num_warps=4
        )
    return out


@triton.jit
def _combine(partial, logarithms, out, rows, shares, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    largest = tl.full((SHARES,), -float("inf"), tl.float32)
    for first in range(0, shares, SHARES):
        at = (first + share) * rows + row
        largest = tl.maximum(largest, tl.load(logarithms + at, mask=first + share < shares, other=-float("inf")))
    top = tl.max(largest, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((SHARES,), tl.float32)
    result = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, shares, SHARES):
        at = (first + share) * rows + row
        logarithm = tl.load(logarithms + at, mask=first + share < shares, other=-float("inf"))
        weight = tl.exp2(logarithm - top)
        inside = (logarithm > -float("inf"))[:, None] & (column < WIDTH)[None, :]
        values = tl.load(partial + at[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        result += tl.sum(values * weight[:, None], 0)
        total += weight
    denominator = tl.sum(total, 0)
    result = result / tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def find_tile(
    tile, starts, lengths, T, B, HEADS: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr
):  # fmt: skip
    """(sequence, its first token, its tokens, its keys, the tile's first row within it).

    Tokens behind starts[B] are sequence B, which has no keys. SEQUENCES is a power of two above B.
    """
    sequence = tl.arange(0, SEQUENCES)
    first = tl.load(starts + sequence, mask=sequence <= B, other=0)
    mine = tl.sum(((first * HEADS // ROWS + sequence <= tile) & (sequence <= B)).to(tl.int32), 0) - 1
    start = tl.load(starts + mine)
    end = tl.load(starts + mine + 1, mask=mine < B, other=T)
    length = tl.load(lengths + mine, mask=mine < B, other=0)
    return mine, start, end - start, length, (tile - start * HEADS // ROWS - mine) * ROWS


@triton.jit
def share_bounds(share, first, length, seen, KEYS: tl.constexpr):
    """Keys of share `share` of a context: from, up to; none past the `seen` that the tile's last row may look at."""
    size = tl.cdiv(tl.cdiv(length - first, tl.num_programs(1)), KEYS) * KEYS
    low = first + share * size
    return low, tl.minimum(low + size, tl.minimum(seen, length))


@triton.jit
def softmax_step(scores, largest, total):
    """One step of a running softmax in base 2: (weights, the factor for what was summed before, new largest, total).

    Rows that have seen nothing yet keep -inf as their largest and weigh nothing.
    """
    new = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(new == -float("inf"), 0.0, new)
    shrink = tl.exp2(largest - finite)
    weights = tl.exp2(scores - finite[:, None])
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)


@triton.jit
def softmax_end(result, largest, total):
    """(result normalised, logarithm of the denominator); zeros and -inf for rows that saw nothing."""
    empty = total == 0.0
    logarithm = tl.where(empty, -float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
    return result / tl.where(empty, 1.0, total)[:, None], logarithm

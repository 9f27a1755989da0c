"""What the paged attention kernels share: which query rows a tile holds, splitting a context, and putting it together.

A tile is up to ROWS query rows (positions x heads) of one sequence, so that a key is read once for all of them. A
context is split into equal shares, each a program of its own; every share leaves a normalised result and the logarithm
of its softmax's denominator, and `combine` weighs them in a fixed order. Grids follow from shapes alone: a program
that finds nothing to do ends, so that a captured graph serves any lengths. Nor is a kernel compiled anew because a
number of tokens or sequences is 1 or divides by 16 (do_not_specialize): that took seconds in the middle of answers.
"""

from functools import cache, lru_cache

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
    """The most tiles that any split of `tokens` among `batch` sequences, and tokens behind them, needs."""
    return min(tokens * triton.cdiv(heads, rows), (tokens * heads + (rows - 1) * (batch + 1)) // rows)


@lru_cache(4096)
def shares_of_context(programs: int, longest: int, keys: int, device: torch.device, resident: int = 1) -> int:
    """Into how many shares to cut contexts of up to `longest` keys, read `keys` at a time by `programs` tiles.

    What minimises the steps of a multiprocessor's `resident` places for programs, with two more for a program's start
    and end; at most 128.
    """
    steps, places = triton.cdiv(longest, keys), multiprocessors(device) * resident

    def steps_of_a_place(shares: int) -> int:
        return triton.cdiv(programs * shares, places) * (triton.cdiv(steps, shares) + 2)

    return min(range(1, min(steps, 128) + 1), key=steps_of_a_place, default=1)


def padded(width: int) -> int:
    """The power of two that `width` numbers are computed in; 16 is the least that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def require_paged(
    query: Tensor,
    pool: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    stored: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless tensors are contiguous, numbers int32, and the pool of dtype `stored`, the query's if
    None."""
    for name, tensor in (("query", query), ("pool", pool), ("tables", tables)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    for name, tensor in (("tables", tables), ("starts", starts), ("lengths", lengths)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be torch.int32, not {tensor.dtype}")
    if pool.dtype != (stored or query.dtype):
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
    block = min(64, triton.next_power_of_2(width))
    if rows:
        _combine[(rows, triton.cdiv(width, block))](
            partial, logarithms, out, rows, shares, WIDTH=width, BLOCK=block, SHARES=triton.next_power_of_2(shares),
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "shares"])
def _combine(partial, logarithms, out, rows, shares, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    at = share.to(tl.int64) * rows + tl.program_id(0)
    logarithm = tl.load(logarithms + at, mask=share < shares, other=-float("inf"))
    largest = tl.max(logarithm, 0)
    weight = tl.exp2(logarithm - tl.where(largest == -float("inf"), 0.0, largest))
    inside = (logarithm > -float("inf"))[:, None] & (column < WIDTH)[None, :]
    values = tl.load(partial + at[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    at_out = out + tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(at_out, result.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def find_tile(tile, starts, lengths, T, B, HEADS: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr):
    """(sequence, its first token, its tokens, its keys, the tile's first row within it); no tokens past the last tile.

    Tokens behind starts[B] are sequence B, which has no keys. SEQUENCES is a power of two above B.
    """
    sequence = tl.arange(0, SEQUENCES)
    first = tl.load(starts + sequence, mask=sequence <= B, other=T)
    after = tl.load(starts + sequence + 1, mask=sequence < B, other=T)
    tiles = tl.cdiv((after - first) * HEADS, ROWS)
    ends = tl.cumsum(tiles, 0)
    mine = tl.sum((ends <= tile).to(tl.int32), 0)
    is_mine = sequence == mine
    start = tl.sum(tl.where(is_mine, first, 0), 0)
    count = tl.sum(tl.where(is_mine, after - first, 0), 0)
    length = tl.load(lengths + mine, mask=mine < B, other=0)
    return mine, start, count, length, (tile - tl.sum(tl.where(is_mine, ends - tiles, 0), 0)) * ROWS


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

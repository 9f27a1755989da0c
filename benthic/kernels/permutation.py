"""Sorting choices by expert, copying rows to their places, and summing them back: a pass over memory each.

The sort is a counting sort in blocks of 64 choices. An atomic counter would give places in the order in which programs
happen to run; here a choice's place follows from counts alone: those of smaller experts, of earlier blocks, and of
earlier equals in its own block, which are found by comparing all pairs. A choice of -1 is none, and so is its place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64


def sort_by_expert(experts: Tensor, num_experts: int, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """experts int64 [T, K] -> tokens int64 [count] (None: T K, of which those past the last end are not written),
    places int64 [T, K], ends int32 [num_experts]; stable."""
    experts = experts.contiguous()
    rows = experts.numel()
    tokens, places = experts.new_empty(rows if count is None else count), torch.empty_like(experts)
    if not rows:
        return tokens, places, experts.new_zeros(num_experts, dtype=torch.int32)
    blocks = triton.cdiv(rows, BLOCK)
    ends = experts.new_empty(num_experts, dtype=torch.int32)
    counts = experts.new_zeros((num_experts, blocks), dtype=torch.int32)
    _count[(blocks,)](experts, counts, rows, blocks, BLOCK=BLOCK, num_warps=2)
    through = counts.view(-1).cumsum(0, dtype=torch.int32)  # choices before and in each (expert, block)
    _place[(blocks,)](
        experts, through, tokens, places, ends, rows, blocks, num_experts,
        K=experts.shape[1], EXPERTS=triton.next_power_of_2(num_experts), BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return tokens, places, ends


def take_rows(x: Tensor, places: Tensor, count: int | None = None) -> Tensor:
    """rows[places[t, k]] = x[t]: x [T, D], places int64 [T, K] -> [count, D]; None: [T K, D].

    By token, so that a row is read once; by row (a gather) it is read K times: 2 K against K + 1 rows of traffic.
    """
    x = x.contiguous()
    rows = x.new_empty((places.numel() if count is None else count, x.shape[1]))
    if rows.numel():
        choices = triton.next_power_of_2(places.shape[1])
        columns = min(1024, max(128, 8192 // choices))
        grid = (triton.cdiv(x.shape[1], columns) * len(x),)
        _take[grid](
            x, places, rows, x.shape[1], places.shape[1], CHOICES=choices, COLUMNS=columns, num_warps=4
        )  # fmt: skip
    return rows


def sum_choices(rows: Tensor, places: Tensor, residual: Tensor | None = None) -> Tensor:
    """sum_k rows[places[t, k]], then + residual[t], in fp32 and in this order: [T K, D] -> [T, D] in rows' dtype."""
    rows = rows.contiguous()
    out = rows.new_empty((len(places), rows.shape[1]))
    if out.numel():
        residual = None if residual is None else residual.contiguous()
        grid = (triton.cdiv(rows.shape[1], 1024) * len(places),)
        _sum[grid](rows, places, residual, out, rows.shape[1], K=places.shape[1], COLUMNS=1024, num_warps=4)
    return out


@triton.jit
def _equals(experts, rows, BLOCK: tl.constexpr):
    """A block's choices: number, expert, whether it names one, and how many equals come before and after it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + i, mask=i < rows, other=-1).to(tl.int32)
    other = tl.load(experts + j, mask=j < rows, other=-1).to(tl.int32)
    same = expert[:, None] == other[None, :]
    before = tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    after = tl.sum((same & (j[None, :] > i[:, None])).to(tl.int32), 1)
    return i, expert, expert >= 0, before, after


@triton.jit
def _count(experts, counts, rows, blocks, BLOCK: tl.constexpr):
    _, expert, exists, before, after = _equals(experts, rows, BLOCK)
    tl.store(counts + expert * blocks + tl.program_id(0), before + 1, mask=exists & (after == 0))


@triton.jit
def _place(
    experts, through, tokens, places, ends, rows, blocks, E,
    K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, expert, exists, before, _ = _equals(experts, rows, BLOCK)
    cell = expert * blocks + tl.program_id(0)
    start = tl.load(through + cell - 1, mask=exists & (cell > 0), other=0)
    place = (start + before).to(tl.int64)
    tl.store(places + i, tl.where(exists, place, -1), mask=i < rows)
    tl.store(tokens + place, (i // K).to(tl.int64), mask=exists)
    if tl.program_id(0) == 0:
        e = tl.arange(0, EXPERTS)
        tl.store(ends + e, tl.load(through + (e + 1) * blocks - 1, mask=e < E, other=0), mask=e < E)


@triton.jit
def _take(x, places, rows, D, K, CHOICES: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(D, COLUMNS)
    t = (tl.program_id(0) // across).to(tl.int64)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, CHOICES)
    loaded = tl.load(x + t * D + c, mask=c < D)
    place = tl.load(places + t * K + k, mask=k < K, other=-1)
    inside = (place >= 0)[:, None] & (c < D)[None, :]
    copies = tl.broadcast_to(loaded[None, :], (CHOICES, COLUMNS))
    tl.store(rows + place[:, None] * D + c[None, :], copies, mask=inside)


@triton.jit
def _sum(rows, places, residual, out, D, K: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(D, COLUMNS)
    t = (tl.program_id(0) // across).to(tl.int64)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + t * K + k)
        total += tl.load(rows + place * D + c, mask=(c < D) & (place >= 0), other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + t * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + c, total.to(out.dtype.element_ty), mask=c < D)

"""Cross entropy of rows of logits, whose gradient takes the logits' place: no second array of that size.

One program a row. It reads the row twice, the second time from the L2 cache, and writes it once: 4 bytes an element of
bfloat16 from and to memory. The rows in flight, one or two for each of 132 multiprocessors, take 27 MB and more of the
cache's 50 at 102,400 columns, 34 MB and more at 129,280; what has been written would take as much again. So the second
reading starts with what was read last, and it and what is written are the first to leave the cache.
Reference: numerics/reference/loss.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Columns a program works on at once; each 16 bytes of them, one thread's load, keep a running maximum and sum, joined
once at the end: an exponential for an element, and one for 16 bytes that rescales the sum. 1,131 us for 8,192 rows of
102,400 columns (16,384 at once: 1,260), 1,437 us for 129,280 (1,495)."""


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    factor: float,
    with_gradient: bool = True,
) -> Tensor:
    """-log softmax(logits)[target] by row, float32 [T], 0 where the target is -100; computed in float32.

    logits [T, V] become factor * (softmax - one-hot), zeros in rows of -100, unless `with_gradient` is False.
    """
    rows, columns = logits.shape
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, not of strides {logits.stride()}")
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        warps = max(1, block // 512)
        _cross_entropy[(rows,)](
            logits, targets, losses, columns, factor, triton.cdiv(columns, block),
            WITH_GRADIENT=with_gradient, BLOCK=block, LANE=min(block, 16 // logits.element_size()),
            num_warps=warps,
        )  # fmt: skip
    return losses


def multiply_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a float32 scalar on the device, in place; multiplied in float32. Reads nothing where it is 1."""
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, not of strides {x.stride()}")
    blocks = triton.cdiv(x.numel(), 4096)
    if blocks:
        programs = min(blocks, 1024)
        _multiply[(programs,)](x, factor, x.numel(), triton.cdiv(blocks, programs), BLOCK=4096, num_warps=8)


@triton.jit
def _cross_entropy(
    logits, targets, losses, columns, factor, BLOCKS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counts = target != -100
    # Read before anything is written, and before the reductions that all warps wait for.
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    column = tl.arange(0, BLOCK)
    # Finite, so that a place without a column does not subtract infinities. All in powers of 2.
    highest = tl.full((BLOCK // LANE,), -1e38, tl.float32)
    total = tl.zeros((BLOCK // LANE,), tl.float32)
    for block in range(BLOCKS):
        start = block * BLOCK
        inside = start + column < columns
        x = tl.load(logits + start + column, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = tl.reshape(x.to(tl.float32) * 1.4426950408889634, (BLOCK // LANE, LANE))
        higher = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        highest = higher
    top = tl.max(highest, 0)
    log_sum = top + tl.log2(tl.sum(total * tl.exp2(highest - top), 0))
    loss = log_sum * 0.6931471805599453 - chosen
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if WITH_GRADIENT:
        for block in range(BLOCKS):
            start = (BLOCKS - 1 - block) * BLOCK
            inside = start + column < columns
            x = tl.load(logits + start + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp2(x * 1.4426950408889634 - log_sum)
            gradient = tl.where(start + column == target, gradient - 1.0, gradient) * factor
            gradient = tl.where(counts, gradient, 0.0)
            gradient = gradient.to(logits.dtype.element_ty)
            tl.store(logits + start + column, gradient, mask=inside, eviction_policy="evict_first")


@triton.jit
def _multiply(x, factor, count, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    if scale != 1.0:
        for block in range(BLOCKS):
            at = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
            inside = at < count
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)

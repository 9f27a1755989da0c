"""The likeliest token of each row of logits with its log-probability, in one reading of the logits.

A vocabulary is one block's work for torch's argmax, and another's for its softmax: 50 us of a step of 1.5 ms. Here a
row is cut into pieces for as many programs, each of which leaves its largest logit, where that stands, and the sum of
exponentials relative to it; a second launch puts them together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 2048
"""Logits of a program: 50 programs for a vocabulary of 102,400, which a row of logits keeps busy for 2 us."""


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """numerics.reference.likeliest of logits [R, V] with contiguous rows."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1 or not vocabulary:
        raise ValueError(f"logits must be rows of contiguous numbers, not {list(logits.shape)} of {logits.stride()}")
    pieces = triton.cdiv(vocabulary, _PIECE)
    tokens, told = logits.new_empty(rows, dtype=torch.int64), logits.new_empty((3, rows), dtype=torch.float64)
    largest, total = (logits.new_empty((rows, pieces), dtype=torch.float32) for _ in range(2))
    where = logits.new_empty((rows, pieces), dtype=torch.int32)
    if rows:
        _pieces[(rows, pieces)](
            logits, largest, where, total, logits.stride(0), V=vocabulary, PIECE=_PIECE, num_warps=4
        )
        _together[(rows,)](
            largest, where, total, tokens, told, rows, PIECES=pieces, PADDED=triton.next_power_of_2(pieces), num_warps=1
        )
    return tokens, told


@triton.jit
def _pieces(logits, largest, where, total, stride, V: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PIECE
    v = first + tl.arange(0, PIECE)
    values = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
    # NaN is not the largest, whatever the hardware's comparison says: it is found again in the sum.
    best, place = tl.max(tl.where(values == values, values, -float("inf")), 0, return_indices=True)
    base = tl.where(tl.abs(best) == float("inf"), 0.0, best)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + at, best)
    tl.store(where + at, tl.minimum(first + place, V - 1))
    tl.store(total + at, tl.sum(tl.exp(values - base), 0))


@triton.jit(do_not_specialize=["R"])
def _together(largest, where, total, tokens, told, R, PIECES: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0)
    piece = tl.arange(0, PADDED)
    at = row * PIECES + piece
    best = tl.load(largest + at, mask=piece < PIECES, other=-float("inf"))
    top, winner = tl.max(best, 0, return_indices=True)
    token = tl.load(where + row * PIECES + tl.minimum(winner, PIECES - 1)).to(tl.int64)
    part = tl.load(total + at, mask=piece < PIECES, other=0.0)
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    every = tl.sum(part * tl.exp(tl.where(tl.abs(best) == float("inf"), 0.0, best - base)), 0)
    tl.store(tokens + row, token)
    tl.store(told + row, token.to(tl.float64))
    tl.store(told + R + row, (-tl.log(every)).to(tl.float64))
    tl.store(told + 2 * R + row, 1.0)

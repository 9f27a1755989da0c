"""The norms of many gradients from one read of each: a partial sum a program, a row of those a gradient, their sums.

Partial sums lie where their program's number says, so a norm is the same whenever it is taken of the same gradients;
what is not finite stays so. Bytes: those of the gradients. Launches: one a tensor and two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements a program reads at once: two vectors of 16 bytes a thread and more, all asked for before the first use."""
TURNS = 4
"""How many blocks a program adds up: so many more elements than partial sums."""


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """The norm of each of some contiguous tensors of any float dtypes, float32 [len(gradients)]; squared and added in
    float32."""
    for gradient in gradients:
        if not gradient.is_contiguous():
            raise ValueError(f"gradients must be contiguous, not of strides {gradient.stride()}")
    programs = [triton.cdiv(gradient.numel(), BLOCK * TURNS) for gradient in gradients]
    partial = torch.zeros((len(gradients), max(programs)), dtype=torch.float32, device=gradients[0].device)
    for row, gradient, count in zip(partial, gradients, programs, strict=True):
        if count:
            _add_squares[(count,)](gradient, row, gradient.numel(), TURNS=TURNS, BLOCK=BLOCK, num_warps=8)
    return partial.sum(1).sqrt()


@triton.jit
def _add_squares(gradient, partial, count, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.static_range(TURNS):
        at = start + turn * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))

"""Zeros for the weight gradients of experts without tokens."""

import triton
import triton.language as tl
from torch import Tensor


def clear_empty_experts(gradient: Tensor, ends: Tensor) -> None:
    """Sets gradient[e] ([E, ...], contiguous) to zero, in place, where ends[e] equals ends[e - 1] (or 0).

    Which experts are empty stays on the device; those that are not cost a look at two numbers.
    """
    size = gradient[0].numel()
    programs = 64  # an expert, so that a whole layer is a few thousand programs and a look is all that most cost
    steps = triton.cdiv(size, programs * 4096)
    _clear[(len(gradient), programs)](gradient, ends, size, STEPS=steps, BLOCK=4096, num_warps=4)


@triton.jit
def _clear(gradient, ends, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if start == end:
        zeros = tl.zeros([BLOCK], gradient.dtype.element_ty)
        mine = gradient + expert.to(tl.int64) * size
        for step in range(STEPS):
            i = (step * tl.num_programs(1) + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
            tl.store(mine + i, zeros, mask=i < size)

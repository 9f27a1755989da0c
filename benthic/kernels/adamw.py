"""AdamW in one pass over memory: master, gradient and moments in, master, moments and computing copy out.

Bytes an element, with a bfloat16 gradient and parameter: 28 with float32 moments, 20 with bfloat16 ones; those are all
it costs. Clipping and the check for values that are not finite are read from the device and cost no pass of their own.
Reference: numerics/reference/adamw.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.numerics.reference.adamw import Rule

BLOCK = 1024
"""Elements of a program: 4 a thread, the most that all dtypes load at once without being dealt out anew."""


def adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    parameter: Tensor | None,
    rule: Rule,
    clip: Tensor,
    finite: Tensor,
) -> None:
    """One update in place, as the reference's. All tensors are contiguous; `clip` float32 [] and `finite` bool [] are
    read on the device."""
    for name, tensor in {"master": master, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        if tensor.shape != master.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(master.shape)}, not {list(tensor.shape)} of strides {tensor.stride()}"
            )
    count = master.numel()
    if not count:
        return
    correction1, correction2 = rule.corrections
    _adamw[(triton.cdiv(count, BLOCK),)](
        master, gradient, exp_avg, exp_avg_sq, parameter, clip, finite.view(torch.uint8), count,
        1 - rule.learning_rate * rule.weight_decay, rule.learning_rate / correction1, 1 - rule.beta1,
        rule.beta2, 1 - rule.beta2, correction2, rule.epsilon,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _adamw(
    master, gradient, exp_avg, exp_avg_sq, parameter, clip, finite, count,
    kept, rate, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Where the update must not happen, nothing is read or written.
    inside = (at < count) & (tl.load(finite) != 0)
    scaled = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    first = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    first += (scaled - first) * one_minus_beta1
    second = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32) * beta2
    second += scaled * scaled * one_minus_beta2
    tl.store(exp_avg + at, first.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, second.to(exp_avg_sq.dtype.element_ty), mask=inside)
    scale = tl.div_rn(tl.sqrt_rn(second), correction2) + epsilon
    updated = tl.load(master + at, mask=inside, other=0.0) * kept - tl.div_rn(first, scale) * rate
    tl.store(master + at, updated, mask=inside)
    if parameter is not None:
        tl.store(parameter + at, updated.to(parameter.dtype.element_ty), mask=inside)

"""One AdamW update of one parameter, in place. Reference: numerics/reference/adamw.py."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from benthic.numerics.reference import adamw as reference
from benthic.numerics.reference.adamw import Rule


def adamw(
    master: Float32[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    parameter: Float[Tensor, "*shape"] | None,
    rule: Rule,
    clip: Float32[Tensor, ""],
    finite: Bool[Tensor, ""],
) -> None:
    """As the reference's; on a GPU one pass over memory that waits for nothing."""
    if master.device.type != "cuda":
        reference.adamw(master, gradient, exp_avg, exp_avg_sq, parameter, rule, clip, finite)
        return
    from benthic.kernels import adamw as kernels

    kernels.adamw(master, gradient.contiguous(), exp_avg, exp_avg_sq, parameter, rule, clip, finite)
    # torch counts changes in place: what autograd has saved is refused by that count.
    torch.autograd.graph.increment_version([one for one in (master, parameter) if one is not None])


def gradient_norms(gradients: list[Tensor]) -> Float32[Tensor, " {len(gradients)}"]:
    """The Euclidean norm of each, squares and sums in float32 whatever the dtypes; on a GPU from one read of each."""
    if not gradients or gradients[0].device.type != "cuda":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    from benthic.kernels import gradient_norm as kernels

    return kernels.gradient_norms([gradient.contiguous() for gradient in gradients])

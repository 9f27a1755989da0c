"""One AdamW update of one parameter, in place. Reference: numerics/reference/adamw.py."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from benthic.numerics import reference
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
    update = reference.adamw.adamw
    if master.device.type == "cuda":
        from benthic.kernels.adamw import adamw as update
    update(master, gradient.contiguous(), exp_avg, exp_avg_sq, parameter, rule, clip, finite)


def gradient_norm(gradients: list[Tensor]) -> Float32[Tensor, ""]:
    """The joint Euclidean norm, squares and sums in float32 whatever the gradients' dtypes."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))

"""AdamW (arXiv:1711.05101) on float32 masters, with moments in float32 or bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor


class Rule(NamedTuple):
    """The numbers of one update; `updates` counts from 1 and includes this one."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    updates: int

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - beta1^t and sqrt(1 - beta2^t): moments start at zero and are this much too small."""
        return 1 - self.beta1**self.updates, (1 - self.beta2**self.updates) ** 0.5


@torch.no_grad()
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
    """One update in place with gradient * clip, computed in float32; nothing changes unless `finite`.

    Moments are stored in their own dtype, rounded to nearest, but the update uses them before rounding. `parameter`
    gets the master in its dtype; None where the master is the parameter.
    """
    if not finite:
        return
    correction1, correction2 = rule.corrections
    scaled = gradient.float() * clip
    first = exp_avg.float()
    first = first + (scaled - first) * (1 - rule.beta1)
    second = exp_avg_sq.float() * rule.beta2 + scaled * scaled * (1 - rule.beta2)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    scale = second.sqrt() / correction2 + rule.epsilon
    master.mul_(1 - rule.learning_rate * rule.weight_decay).sub_(first / scale * (rule.learning_rate / correction1))
    if parameter is not None:
        parameter.copy_(master)

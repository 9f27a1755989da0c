"""The two ways AdamW is done: in one pass over memory, and torch's own on a processor.

Both leave everything as it was when a flag says that a loss or gradient is not finite; the first without the host ever
asking.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benthic.config.train import OptimizerConfig
from benthic.numerics.reference.adamw import Rule
from benthic.ops.adamw import adamw
from benthic.train.offload import Lanes

FIRST, SECOND = "exp_avg", "exp_avg_sq"
Moments = tuple[Tensor, Tensor]
"""exp_avg and exp_avg_sq of one parameter."""


class OnePass:
    """Reads and writes every byte once. `dtype` is the moments'; with `lanes` moments and masters live in the
    processor's memory."""

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype,
        lanes: Lanes | None,
    ) -> None:
        self._masters, self._parameters, self._lanes = masters, parameters, lanes
        self.moments: dict[str, Moments] = {}
        for name, master in masters.items():
            zeros = torch.zeros_like(master, dtype=dtype)
            self.moments[name] = (zeros, zeros.clone()) if lanes is None else (lanes.keep(zeros), lanes.keep(zeros))

    def keeps(self, gradient: Tensor) -> Tensor:
        """A lone micro-batch's gradient until the update: as its product wrote it."""
        return gradient

    def take_over(self, moments: Mapping[str, Moments], updates: int) -> None:
        """Continue with these; their number of updates comes with the rule of each step."""
        for name, saved in moments.items():
            for mine, one in zip(self.moments[name], saved, strict=True):
                mine.copy_(one)

    def step(self, gradients: Mapping[str, Tensor], rules: Mapping[str, Rule], clip: Tensor, finite: Tensor) -> None:
        """One update of all that has a gradient: `clip` float32 [] multiplies it, `finite` bool [] allows it."""
        for name, gradient in gradients.items():
            master, parameter = self._masters[name], self._parameters[name]
            published = None if parameter is master else parameter.detach()
            tensors = master.detach(), gradient, *self.moments[name], published
            if self._lanes is None:
                adamw(*tensors, rules[name], clip, finite)
            else:
                _by_pieces(self._lanes, *tensors, rules[name], clip, finite)
        if self._lanes is not None:
            self._lanes.finish()


def _by_pieces(
    lanes: Lanes, master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, parameter: Tensor | None,
    rule: Rule, clip: Tensor, finite: Tensor,
) -> None:  # fmt: skip
    """An update of what visits the device. Elements know nothing of each other, so the result is the same."""
    gradient = gradient.contiguous().view(-1)
    master, first, second = master.view(-1), first.view(-1), second.view(-1)
    for piece in lanes.pieces(gradient.numel()):
        if parameter is None:
            # A float32 model's parameter is its own master and stays where it is.
            with lanes.visiting((first[piece], second[piece])) as (mine, other):
                adamw(master[piece], gradient[piece], mine, other, None, rule, clip, finite)
        else:
            published = parameter.view(-1)[piece]
            with lanes.visiting((master[piece], first[piece], second[piece])) as (placed, mine, other):
                adamw(placed, gradient[piece], mine, other, published, rule, clip, finite)


class OnProcessor:
    """torch's AdamW, fused for processors, on float32 moments."""

    def __init__(
        self,
        config: OptimizerConfig,
        masters: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        decayed: frozenset[str],
    ) -> None:
        self._masters, self._parameters = masters, parameters
        groups = [
            {"params": [one for name, one in masters.items() if name in decayed], "weight_decay": config.weight_decay},
            {"params": [one for name, one in masters.items() if name not in decayed], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    @property
    def moments(self) -> dict[str, Moments]:
        """Of every parameter that has been updated."""
        state = self._adamw.state
        return {name: (state[one][FIRST], state[one][SECOND]) for name, one in self._masters.items() if one in state}

    def keeps(self, gradient: Tensor) -> Tensor:
        """A lone micro-batch's gradient until the update: torch's kernel wants it in float32."""
        return gradient.float()

    def take_over(self, moments: Mapping[str, Moments], updates: int) -> None:
        """Continue with these after `updates` updates."""
        for name, (first, second) in moments.items():
            state = {"step": torch.tensor(float(updates)), FIRST: first.clone(), SECOND: second.clone()}
            self._adamw.state[self._masters[name]] = state

    def step(self, gradients: Mapping[str, Tensor], rules: Mapping[str, Rule], clip: Tensor, finite: Tensor) -> None:
        """As OnePass's; gradients are clipped in place."""
        if not finite:
            return
        for name, gradient in gradients.items():
            self._masters[name].grad = gradient.mul_(clip)
        for group in self._adamw.param_groups:
            group["lr"] = next(iter(rules.values())).learning_rate
        self._adamw.step()
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.detach().copy_(self._masters[name].detach())
                self._masters[name].grad = None

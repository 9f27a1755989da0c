"""An exponential average of the weights: where a decayed learning rate would arrive (arXiv:2412.19437, 3.2.3).

Biases of the routers are averaged with the weights they were balanced for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from benthic.parallel.placement import forget_gathered, local


class Average:
    """float32 averages by name, in the memory of the weights' device.

    Update n uses min(decay, (1 + n) / (10 + n)), so that the untrained start does not stay in the average.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Move towards `weights`, which have had `updates` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = list(self.tensors.values())
        torch._foreach_lerp_(averages, [weights[name].detach() for name in self.tensors], 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved averages."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextmanager
    def installed(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, `model` computes with the averages; its own tensors are put back afterwards, bit for bit."""
        live = {name: local(tensor) for name, tensor in model.state_dict().items() if name in self.tensors}
        forget_gathered(model)
        kept = {name: tensor.clone() for name, tensor in live.items()}
        try:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(self.tensors[name])
            yield
        finally:
            forget_gathered(model)
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(kept[name])

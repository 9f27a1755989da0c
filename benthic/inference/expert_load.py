"""How evenly the tokens of an engine go to its experts: the one number of a mixture that only serving shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from benthic.config.model import ModelConfig
from benthic.ops.route import Routing

LEAST_MEAN = 16
"""Tokens an expert, below which the busiest one is so by chance."""


class LayerLoad(NamedTuple):
    """Of one layer: tokens of its busiest expert over the mean of all since the last look (1 is perfect balance, E / K
    the worst), and how many experts got none since the engine began."""

    layer: int
    max_over_mean: float
    unused: int


class ExpertLoad:
    """Counts where the tokens of all steps went, on their device: two small kernels a step, read when asked.

    Prediction layers do not count, nor does a dense model.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._layers = [layer for layer in range(config.num_hidden_layers) if config.is_expert_layer(layer)]
        shape = len(self._layers), config.n_routed_experts or 0
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)  # [layers, E]
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._seen = torch.zeros(shape, dtype=torch.int64)

    def add(self, routing: Mapping[int, Routing], tokens: int) -> None:
        """Count the first `tokens` rows of a step's routing."""
        if self._layers:
            chosen = torch.stack([routing[layer].experts[:tokens] for layer in self._layers]).flatten(1)  # [layers, TK]
            self._counts.scatter_add_(1, chosen, self._one.expand_as(chosen))

    def take(self) -> list[LayerLoad]:
        """The load since the last look; nothing as long as too few tokens came for one."""
        counts = self._counts.to("cpu", copy=True)
        news = (counts - self._seen).double()
        if not self._layers or news.mean() < LEAST_MEAN:
            return []
        self._seen = counts
        ratios, unused = news.amax(1) / news.mean(1), (counts == 0).sum(1)
        return [LayerLoad(*row) for row in zip(self._layers, ratios.tolist(), unused.tolist(), strict=True)]

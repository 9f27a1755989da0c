"""Choosing experts, one token at a time.

sigmoid + noaux_tc          DeepSeek-V3, section 2.1.2: biased choice, groups by the sum of their two best
softmax + greedy            DeepSeekMoE, V2-Lite; top-2 and top-1 of few experts as in GShard and Switch
softmax + group_limited     DeepSeek-V2, section 2.2.2: groups by their best
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from benthic.config.model import ModelConfig


def route(
    logits: Float[Tensor, "tokens experts"], bias: Float32[Tensor, " experts"] | None, config: ModelConfig
) -> tuple[Float[Tensor, "tokens experts"], Int64[Tensor, "tokens chosen"], Float[Tensor, "tokens chosen"]]:
    """Scores, experts best first, and weights of router `logits`."""
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    biased = scores if bias is None else scores + bias
    experts = torch.tensor([_choose(row, config) for row in biased.tolist()])
    weights = scores.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return scores, experts, weights * config.routed_scaling_factor


def _choose(scores: list[float], config: ModelConfig) -> list[int]:
    groups = 1 if config.topk_method == "greedy" else config.n_group
    size = len(scores) // groups
    counted = 2 if config.topk_method == "noaux_tc" else 1
    bests = [sorted(scores[first : first + size], reverse=True)[:counted] for first in range(0, len(scores), size)]
    kept = sorted(range(groups), key=lambda group: sum(bests[group]), reverse=True)
    kept = kept[: config.topk_group if groups > 1 else 1]
    candidates = [expert for expert in range(len(scores)) if expert // size in kept]
    return sorted(candidates, key=lambda expert: scores[expert], reverse=True)[: config.num_experts_per_tok]

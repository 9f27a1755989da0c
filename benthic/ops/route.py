"""Choosing experts. Reference: numerics/reference/routing.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from benthic.config.model import ModelConfig


class Routing(NamedTuple):
    """Where tokens go: `scores` (sigmoid or softmax, before any bias), `experts` in no particular order, and the
    `weights` that multiply the experts' outputs."""

    scores: Float32[Tensor, "tokens experts"]
    experts: Int64[Tensor, "tokens chosen"]
    weights: Float32[Tensor, "tokens chosen"]


def route(
    logits: Float32[Tensor, "tokens experts"], bias: Float32[Tensor, " experts"] | None, config: ModelConfig
) -> Routing:
    """Experts of each token from router `logits` and the balancing `bias`.

    The bias moves the choice and never the weights (DeepSeek-V3, section 2.1.2).
    """
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    with torch.no_grad():
        choice = scores.detach() if bias is None else scores.detach() + bias
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            choice = _within_best_groups(choice, config)
        experts = choice.topk(config.num_experts_per_tok, sorted=False).indices
    weights = scores.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1.0:
        weights = weights * config.routed_scaling_factor
    return Routing(scores, experts, weights)


def _within_best_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """`choice` with -inf outside the topk_group best groups; a group's score is its two best summed (V3) or its
    best (V2)."""
    grouped = choice.unflatten(1, (config.n_group, -1))  # [T, G, E / G]
    if config.topk_method == "noaux_tc":
        group_scores = grouped.topk(2, sorted=False).values.sum(-1)
    else:
        group_scores = grouped.amax(-1)
    kept = group_scores.topk(config.topk_group, sorted=False).indices
    # Not 0: biases may be negative, and then a masked expert would beat a kept one.
    penalty = torch.full_like(group_scores, -torch.inf).scatter_(1, kept, 0.0)
    return (grouped + penalty[..., None]).flatten(1)

"""Gated feed-forward (arXiv:2002.05202) and the sum over routed experts, one token and one expert at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from benthic.numerics.reference.swiglu import swiglu


def feed_forward(
    x: Float[Tensor, "*tokens width"],
    gate_proj: Float[Tensor, "inner width"],
    up_proj: Float[Tensor, "inner width"],
    down_proj: Float[Tensor, "width inner"],
) -> Float[Tensor, "*tokens width"]:
    """down(swiglu(gate x, up x))."""
    return swiglu(x @ gate_proj.T, x @ up_proj.T) @ down_proj.T


def routed_experts(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t]."""
    rows = []
    for token, chosen, weight in zip(x, experts.tolist(), weights, strict=True):
        gates_and_ups = [gate_up_proj[expert].chunk(2) for expert in chosen]
        outputs = [
            feed_forward(token, gate, up, down_proj[expert])
            for expert, (gate, up) in zip(chosen, gates_and_ups, strict=True)
        ]
        rows.append(torch.einsum("k,kd->d", weight, torch.stack(outputs)))
    return torch.stack(rows) if rows else torch.zeros_like(x)

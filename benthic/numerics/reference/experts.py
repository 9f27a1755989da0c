"""Gated feed-forward (arXiv:2002.05202) and the sum over routed experts, one token and one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return gate * gate.sigmoid() * up


def feed_forward(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """down(swiglu(gate x, up x)) with matrices [out, in]."""
    return swiglu(x @ gate_proj.T, x @ up_proj.T) @ down_proj.T


def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t]: [T, D]. Shapes as in benthic.ops.routed_experts."""
    rows = []
    for token, chosen, weight in zip(x, experts.tolist(), weights, strict=True):
        gates_and_ups = [gate_up_proj[expert].chunk(2) for expert in chosen]
        outputs = [
            feed_forward(token, gate, up, down_proj[expert])
            for expert, (gate, up) in zip(chosen, gates_and_ups, strict=True)
        ]
        rows.append(torch.einsum("k,kd->d", weight, torch.stack(outputs)))
    return torch.stack(rows)

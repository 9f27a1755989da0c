"""Routed experts for few tokens, in plain torch: weights as they are, or e4m3 with a factor for 128 x 128."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

from benthic.numerics.reference.experts import routed_experts
from benthic.numerics.reference.quantisation import dequantise_blocks


def few_token_experts(
    x: Float[Tensor, "tokens width"],
    experts: Int[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    shared_gate_up: Float[Tensor, "shared_gate_and_up width"] | None = None,
    shared_down: Float[Tensor, "width shared_gate_and_up//2"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t], and a shared one's output, in float32 throughout."""
    out = routed_experts(x.float(), experts, weights, gate_up_proj.float(), down_proj.float())
    if shared_gate_up is not None and shared_down is not None:
        gate, up = (x.float() @ shared_gate_up.float().t()).chunk(2, -1)
        out = out + (F.silu(gate) * up) @ shared_down.float().t()
    return out.type_as(x)


def few_token_experts_fp8(
    x: Float[Tensor, "tokens width"],
    experts: Int[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    gate_up_scales: Float32[Tensor, "experts gate_and_up_blocks width_blocks"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    down_scales: Float32[Tensor, "experts width_blocks gate_and_up_blocks//2"],
) -> Float[Tensor, "tokens width"]:
    """The same; gate and up were quantised apart, the gate's blocks come first."""
    gates_and_ups = [
        torch.cat([dequantise_blocks(half, factors) for half, factors in zip(rows.chunk(2), of.chunk(2), strict=True)])
        for rows, of in zip(gate_up_proj, gate_up_scales, strict=True)
    ]
    downs = [dequantise_blocks(rows, factors) for rows, factors in zip(down_proj, down_scales, strict=True)]
    return few_token_experts(x, experts, weights, torch.stack(gates_and_ups), torch.stack(downs))

"""Routed experts for the few tokens of a decoding step. Reference: numerics/reference/expert_decode.py.

No gradients. On a GPU the chosen experts' weights are read once and nothing is sorted; elsewhere this is
`routed_experts`, and e4m3 weights are given back their factors expert by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from benthic.numerics.reference.quantisation import dequantise_blocks
from benthic.ops.experts import routed_experts
from benthic.ops.swiglu import swiglu

MOST_PAIRS = 1024
"""T K, choices of experts in a call, that the GPU's kernel takes."""


def few_token_experts(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    shared_gate_up: Float[Tensor, "shared_gate_and_up width"] | None = None,
    shared_down: Float[Tensor, "width shared_gate_and_up//2"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t], in x's dtype; T K up to MOST_PAIRS. A shared MLP as wide as
    whole experts, gate rows first, is read along with them and added."""
    if x.is_cuda:
        from benthic.kernels import expert_decode

        choices = x, experts, weights, gate_up_proj, down_proj
        return expert_decode.few_token_experts(*choices, shared_gate_up, shared_down)
    out = routed_experts(x, experts, weights, gate_up_proj, down_proj)
    if shared_gate_up is None or shared_down is None:
        return out
    return out + F.linear(swiglu(*F.linear(x, shared_gate_up).chunk(2, -1)), shared_down)


def few_token_experts_fp8(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    gate_up_scales: Float32[Tensor, "experts gate_and_up_blocks width_blocks"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    down_scales: Float32[Tensor, "experts width_blocks gate_and_up_blocks//2"],
) -> Float[Tensor, "tokens width"]:
    """few_token_experts with e4m3 weights and a factor for each 128 x 128 of them, as published checkpoints have.

    gate_up_scales holds the gate's ceil(F / 128) rows of blocks, then the up projection's. No weight is held in x's
    dtype but those of the experts that were chosen, and on a GPU not even those.
    """
    if x.is_cuda:
        from benthic.kernels import expert_decode

        return expert_decode.few_token_experts_fp8(
            x, experts, weights, gate_up_proj, gate_up_scales, down_proj, down_scales
        )
    chosen, places = experts.unique(return_inverse=True)
    gate_ups = [
        torch.cat([
            dequantise_blocks(half, factors, dtype=x.dtype)
            for half, factors in zip(gate_up_proj[e].chunk(2), gate_up_scales[e].chunk(2), strict=True)
        ])
        for e in chosen.tolist()
    ]  # fmt: skip
    downs = [dequantise_blocks(down_proj[e], down_scales[e], dtype=x.dtype) for e in chosen.tolist()]
    return routed_experts(x, places, weights, torch.stack(gate_ups), torch.stack(downs))

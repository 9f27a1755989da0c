"""Plain torch for benthic.kernels.swiglu_fp8: same names, signatures and layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.numerics.reference.quantise import dequantise_rows, quantise_rows


def swiglu_quantised(hidden: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, 2F] -> silu(gate) * up * weights [T] and hidden's two halves, quantised by rows: (values [T, F],
    scales [ceil(F / 128), T], values [T, 2F], scales [2 ceil(F / 128), T])."""
    gate, up = hidden.float().chunk(2, -1)
    active = gate * gate.sigmoid() * up
    if weights is not None:
        active = active * weights[:, None]
    halves = [quantise_rows(half, power_of_two=True) for half in (gate, up)]
    kept = torch.cat([values for values, _ in halves], 1)
    return *quantise_rows(active, power_of_two=True), kept, torch.cat([scales for _, scales in halves])


def swiglu_gradient_quantised(
    gradient: Tensor, kept: Tensor, kept_scales: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """From the gradient [T, F] of swiglu_quantised's first result and what it kept: the gradient of hidden and that
    first result again, quantised by rows, and the gradient of `weights`."""
    hidden_gradient, active, weights_gradient = swiglu_gradient(gradient, kept, kept_scales, weights)
    if gradient.shape[1] % 128:
        hidden_gradient = hidden_gradient.to(gradient.dtype)
    return (
        *quantise_rows(hidden_gradient, power_of_two=True),
        *quantise_rows(active, power_of_two=True),
        weights_gradient,
    )


def swiglu_gradient(
    gradient: Tensor, kept: Tensor, kept_scales: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As swiglu_gradient_quantised, in float32 and not quantised: [T, 2F], [T, F], [T] or None."""
    halves = zip(kept.chunk(2, 1), kept_scales.chunk(2), strict=True)
    gate, up = (dequantise_rows(values.contiguous(), scales) for values, scales in halves)
    gradient = gradient.float()
    sigmoid = gate.sigmoid()
    gated = gate * sigmoid
    active, weights_gradient = gated * up, None
    if weights is not None:
        weights_gradient = (gradient * active).sum(1)
        gradient, active = gradient * weights[:, None], active * weights[:, None]
    gate_gradient = gradient * up * (sigmoid + gated * (1 - sigmoid))
    return torch.cat((gate_gradient, gradient * gated), 1), active, weights_gradient

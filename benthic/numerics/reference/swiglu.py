"""Gated activation (arXiv:2002.05202), with and without a routing weight a row, and its gradient written out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up."""
    return gate * gate.sigmoid() * up


def swiglu_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """d gate and d up; in float32 inside, as all below."""
    d, g, u = grad.float(), gate.float(), up.float()
    s = g.sigmoid()
    return (d * u * (s + g * s * (1 - s))).type_as(gate), (d * g * s).type_as(up)


def weighted_swiglu(
    hidden: Float[Tensor, "rows gate_and_up"], weights: Float32[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows gate_and_up//2"]:
    """weights[r] * silu(gate[r]) * up[r], gate and up being the halves of a row of `hidden`."""
    active = swiglu(*hidden.float().chunk(2, -1))
    return (active if weights is None else weights[:, None] * active).type_as(hidden)


def weighted_swiglu_backward(
    grad: Float[Tensor, "rows inner"],
    hidden: Float[Tensor, "rows 2*inner"],
    weights: Float32[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "rows 2*inner"], Float32[Tensor, " rows"] | None, Float[Tensor, "rows inner"]]:
    """d hidden, d weights, and what `weighted_swiglu` gives."""
    gate, up = hidden.float().chunk(2, -1)
    grad = grad.float()
    grad_weights = None if weights is None else (grad * swiglu(gate, up)).sum(-1)
    grad_active = grad if weights is None else grad * weights[:, None]
    grad_hidden = torch.cat(swiglu_backward(grad_active, gate, up), -1).type_as(hidden)
    return grad_hidden, grad_weights, weighted_swiglu(hidden, weights)

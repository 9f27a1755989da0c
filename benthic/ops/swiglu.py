"""silu(gate) * up (arXiv:2002.05202), plain and with routing weights. Reference: numerics/reference/swiglu.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.recomputation import cheap, remember


@cheap
def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gated activation, element by element."""
    if gate.is_cuda:
        # Two passes and a product in memory become one pass, forwards and backwards.
        return _Swiglu.apply(gate, up)
    activated = F.silu(gate)
    remember(activated, F.silu, gate)
    return activated * up


def weighted_swiglu(
    hidden: Float[Tensor, "rows gate_and_up"], weights: Float32[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows gate_and_up//2"]:
    """The gated activation of rows that hold gate, then up; times a routing weight a row."""
    return _WeightedSwiglu.apply(hidden, weights)


def weighted_swiglu_backward(
    grad: Float[Tensor, "rows inner"], hidden: Float[Tensor, "rows 2*inner"], weights: Float32[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows 2*inner"], Float32[Tensor, " rows"], Float[Tensor, "rows inner"]]:
    """d hidden, d weights, and the activation again, for a backward that kept `hidden` alone."""
    return _implementation(hidden).weighted_swiglu_backward(grad, hidden, weights)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _implementation(gate).swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return _implementation(grad).swiglu_backward(grad, *ctx.saved_tensors)


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weights)
        return _implementation(hidden).weighted_swiglu(hidden, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return _implementation(grad).weighted_swiglu_backward(grad, *ctx.saved_tensors)[:2]


def _implementation(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from benthic.kernels import swiglu
    else:
        from benthic.numerics.reference import swiglu
    return swiglu

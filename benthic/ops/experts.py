"""The routed experts' outputs, weighted and summed. Reference: numerics/reference/experts.py.

Tokens are sorted by expert, each expert multiplies its own rows, and a token's K results are summed in float32 in the
order of its choices: the same result on every run, whatever the load.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.errors import ConfigError
from benthic.ops.expert_loop import expert_loop, experts_one_by_one
from benthic.ops.permutation import Permutation, by_choice, by_row, sort_by_expert, sum_choices, take_rows
from benthic.ops.swiglu import weighted_swiglu, weighted_swiglu_backward


def routed_experts(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    count: int | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t], in x's dtype. Choices of -1 are none; `count` is then how
    many are not.

    `gate_up_proj` [E, 2F, D] holds gate rows, then up rows. An expert without tokens costs nothing and gets a zero
    gradient.
    """
    if x.device.type == "cpu":
        loop = expert_loop if torch.is_grad_enabled() else experts_one_by_one
        return loop(x, experts, weights, gate_up_proj, down_proj, count)
    # One launch for all experts, and no wait for the counts to reach the processor.
    return _grouped(x, experts, weights, gate_up_proj, down_proj, count)


def _grouped(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, count: int | None = None
) -> Tensor:
    _check_widths(gate_up_proj, down_proj)
    return _GroupedExperts.apply(x, experts, weights, gate_up_proj, down_proj, count)


class _GroupedExperts(torch.autograd.Function):
    """All experts in one product, their rows sorted. The routing weight multiplies the activation, before down_proj,
    as DeepSeek has it: the sum over choices is then a plain one, and so is its gradient.

    Kept for backward: x and the first product's result. The activation is computed again in the pass that yields its
    gradient; the rows of x are taken again, (K + 1) T D numbers of traffic (0.3% of a step) against K T D held in every
    layer. Every operand is taken as it lies: grouped_mm reads either order, so nothing is transposed in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        count: int | None,
    ) -> Tensor:
        permutation = sort_by_expert(experts, len(gate_up_proj), count)
        row_weights = by_row(weights, permutation)
        hidden = _product(take_rows(x, permutation), gate_up_proj.transpose(1, 2), permutation.ends)  # [T K, 2F]
        out = _product(weighted_swiglu(hidden, row_weights), down_proj.transpose(1, 2), permutation.ends)  # [T K, D]
        ctx.save_for_backward(x, row_weights, gate_up_proj, down_proj, hidden, *permutation)
        return sum_choices(out, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        x, row_weights, gate_up_proj, down_proj, hidden, *sorted_choices = ctx.saved_tensors
        permutation = Permutation(*sorted_choices)
        grad_out = take_rows(grad, permutation)  # [T K, D]
        grad_active = _product(grad_out, down_proj, permutation.ends)  # [T K, F]
        grad_hidden, grad_weights, active = weighted_swiglu_backward(grad_active, hidden, row_weights)
        del grad_active
        grad_down = _weight_gradient(grad_out, active, permutation.ends)
        del grad_out, active
        grad_gate_up = _weight_gradient(grad_hidden, take_rows(x, permutation), permutation.ends)
        grad_x = sum_choices(_product(grad_hidden, gate_up_proj, permutation.ends), permutation)
        return grad_x, None, by_choice(grad_weights, permutation.places), grad_gate_up, grad_down, None


def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows [n, I] @ its weights [E, I, O]: [T K, O]."""
    if not len(rows):
        return rows.new_empty(0, weights.shape[-1])
    # Every row belongs to an expert, so the last end is T K: no rows are left undefined.
    return F.grouped_mm(rows, weights, offs=ends)


def _weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Each expert's grad.T @ rows, over its rows [n, O] and [n, I]: [E, O, I]; zero for an expert without any.

    This order of both (the first by columns, the second by rows) is the one in which torch's CUTLASS kernel takes
    groups of no rows (aten/src/ATen/native/cuda/GroupMMCommon.cuh); what it leaves for them is not promised.
    """
    if not len(rows):
        return rows.new_zeros(len(ends), grad.shape[1], rows.shape[1])
    gradient = F.grouped_mm(grad.t(), rows, offs=ends)
    if gradient.is_cuda:
        from benthic.kernels.empty_experts import clear_empty_experts

        clear_empty_experts(gradient, ends)
    return gradient


def _check_widths(gate_up_proj: Tensor, down_proj: Tensor) -> None:
    """Rows of whole 16 bytes are what torch's grouped product takes; its own message names no setting."""
    unit = 16 // down_proj.itemsize
    widths = {"hidden_size": gate_up_proj.shape[-1], "moe_intermediate_size": down_proj.shape[-1]}
    for name, width in widths.items():
        if width % unit:
            raise ConfigError(
                f"{name} is {width}; on a GPU experts in {down_proj.dtype} need a multiple of {unit}",
                hint=f"use {-(-width // unit) * unit}, or train on the processor",
            )

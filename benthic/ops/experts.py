"""The routed experts' outputs, weighted and summed. Reference: numerics/reference/experts.py.

Tokens are sorted by expert, each expert multiplies its own rows, and a token's K results are summed in float32 in the
order of its choices: the same result on every run, whatever the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.errors import ConfigError
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
    if x.device.type == "cpu" and count is not None:
        return _some_choices(x, experts, weights, gate_up_proj, down_proj, count)
    if x.device.type == "cpu":
        if len(x) == 1 and not torch.is_grad_enabled():
            return _one_token(x, experts, weights, gate_up_proj, down_proj)
        # grouped_mm is itself a loop on the processor: no faster in training, by and large, and slower in
        # decoding. It keeps every intermediate for backward, and takes no width that is not whole 16 bytes.
        return _ExpertLoop.apply(x, experts, weights, gate_up_proj, down_proj)
    # One launch for all experts, and no wait for the counts to reach the processor.
    return _grouped(x, experts, weights, gate_up_proj, down_proj, count)


def _grouped(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, count: int | None = None
) -> Tensor:
    _check_widths(gate_up_proj, down_proj)
    return _GroupedExperts.apply(x, experts, weights, gate_up_proj, down_proj, count)


def _some_choices(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, count: int
) -> Tensor:
    """One row a choice, for a loop over experts that knows no choice of none."""
    permutation = sort_by_expert(experts, len(gate_up_proj), count)
    loads = permutation.ends.long().diff(prepend=permutation.ends.new_zeros(1))
    chosen = torch.arange(len(loads)).repeat_interleave(loads, output_size=count)[:, None]
    row_weights = by_row(weights, permutation)[:, None]
    rows = _ExpertLoop.apply(take_rows(x, permutation), chosen, row_weights, gate_up_proj, down_proj)
    return sum_choices(rows, permutation)


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


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _one_token(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Decoding one sequence: K matrix-vector products and nothing to sort."""
    token, chosen = x[0], experts[0].tolist()
    gate, up = torch.stack([torch.mv(gate_up_proj[expert], token) for expert in chosen]).chunk(2, -1)  # [K, F]
    active = F.silu(gate).mul_(up).unbind(0)
    out = torch.stack([torch.mv(down_proj[expert], row) for expert, row in zip(chosen, active, strict=True)])
    return torch.mm(weights, out.float()).type_as(x)


class _ExpertLoop(torch.autograd.Function):
    """Experts one after another. Keeps the first product's result and no more: the activation is computed again in
    backward, and d weights = <d y W_down, h> needs no expert's output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(gate_up_proj)).tolist()
        tokens = order // experts.shape[1]
        hidden = x.new_empty(len(order), gate_up_proj.shape[1])
        out = x.new_empty(len(order), x.shape[1])
        for expert, rows in _loaded(counts):
            mine = hidden[rows]
            torch.mm(x.index_select(0, tokens[rows]), gate_up_proj[expert].t(), out=mine)
            gate, up = mine.chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up), down_proj[expert].t(), out=out[rows])
        places = _inverse(order).view_as(experts)
        ctx.save_for_backward(x, weights, gate_up_proj, down_proj, order, tokens, places, hidden)
        ctx.counts = counts
        return _sum_choices(out, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        x, weights, gate_up_proj, down_proj, order, tokens, places, hidden = ctx.saved_tensors
        grad_gate_up, grad_down = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        grad_rows = x.new_empty(len(order), x.shape[1])
        grad_weights = weights.new_empty(len(order))
        row_weights = weights.flatten().index_select(0, order)[:, None].type_as(x)
        for expert in (expert for expert, count in enumerate(ctx.counts) if not count):
            grad_gate_up[expert].zero_()
            grad_down[expert].zero_()
        for expert, rows in _loaded(ctx.counts):
            mine, weight = tokens[rows], row_weights[rows]
            grad_out, inputs = grad.index_select(0, mine), x.index_select(0, mine)
            gate, up = hidden[rows].chunk(2, -1)
            gated = F.silu(gate)
            active = gated * up
            grad_active = grad_out @ down_proj[expert]
            torch.sum(grad_active * active, -1, dtype=torch.float32, out=grad_weights[rows])
            torch.mm(grad_out.t(), active.mul_(weight), out=grad_down[expert])
            grad_active.mul_(weight)
            grad_gate = torch.ops.aten.silu_backward(grad_active * up, gate)
            grad_hidden = torch.cat((grad_gate, grad_active.mul_(gated)), -1)
            torch.mm(grad_hidden.t(), inputs, out=grad_gate_up[expert])
            torch.mm(grad_hidden, gate_up_proj[expert], out=grad_rows[rows])
        return _sum_choices(grad_rows, places, None), None, grad_weights[places], grad_gate_up, grad_down


def _loaded(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have tokens, and the rows of those in sorted order."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


def _sum_choices(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * rows[places[t, k]], in float32: [T, D] in rows' dtype."""
    # One pass over rows instead of a gather, a product and a sum.
    return F.embedding_bag(places, rows.float(), per_sample_weights=weights, mode="sum").type_as(rows)

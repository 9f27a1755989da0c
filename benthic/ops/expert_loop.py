"""Routed experts of a processor: one after another, each with its own rows. Reference: numerics/reference/experts.py.

torch's grouped_mm is itself a loop there: no faster in training, by and large, and slower in decoding. It keeps every
intermediate for backward, and takes no width that is not whole 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.permutation import Permutation, by_row, sort_by_expert, sum_choices, take_rows


@runtime_checkable
class Stack(Protocol):
    """Matrices one for each expert: a tensor [E, O, I], or what makes them when they are asked for."""

    def __getitem__(self, expert: int, /) -> Tensor: ...

    def __len__(self) -> int: ...


def expert_loop(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    count: int | None = None,
) -> Float[Tensor, "tokens width"]:
    """routed_experts with gradients."""
    if count is None:
        return _ExpertLoop.apply(x, experts, weights, gate_up_proj, down_proj)
    permutation = sort_by_expert(experts, len(gate_up_proj), count)
    choices = _row_by_row(permutation, weights)
    return sum_choices(_ExpertLoop.apply(take_rows(x, permutation), *choices, gate_up_proj, down_proj), permutation)


def experts_one_by_one(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Stack,
    down_proj: Stack,
    count: int | None = None,
) -> Float[Tensor, "tokens width"]:
    """routed_experts without gradients, asking for one expert's matrices at a time, and for those with tokens alone."""
    if count is not None:
        permutation = sort_by_expert(experts, len(gate_up_proj), count)
        choices = _row_by_row(permutation, weights)
        rows = experts_one_by_one(take_rows(x, permutation), *choices, gate_up_proj, down_proj)
        return sum_choices(rows, permutation)
    if len(x) == 1:
        return _one_token(x, experts, weights, gate_up_proj, down_proj)
    out, _, _, places, _, _ = _by_expert(x, experts, gate_up_proj, down_proj)
    return _sum_choices(out, places, weights)


def _row_by_row(permutation: Permutation, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The expert and the weight of each sorted row, [rows, 1]."""
    loads = permutation.ends.long().diff(prepend=permutation.ends.new_zeros(1))
    chosen = torch.arange(len(loads)).repeat_interleave(loads, output_size=len(permutation.tokens))
    return chosen[:, None], by_row(weights, permutation)[:, None]


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _one_token(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Stack, down_proj: Stack) -> Tensor:
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
        out, order, tokens, places, hidden, counts = _by_expert(x, experts, gate_up_proj, down_proj)
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


def _by_expert(
    x: Tensor, experts: Tensor, gate_up_proj: Stack, down_proj: Stack
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Results of all choices sorted by expert [T K, D], the sort's order and tokens, where each choice went, the first
    product's result [T K, 2F], and how many each expert has."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(gate_up_proj)).tolist()
    tokens = order // experts.shape[1]
    hidden, out = None, x.new_empty(len(order), x.shape[1])
    for expert, rows in _loaded(counts):
        first = gate_up_proj[expert]
        if hidden is None:
            hidden = x.new_empty(len(order), len(first))
        mine = hidden[rows]
        torch.mm(x.index_select(0, tokens[rows]), first.t(), out=mine)
        gate, up = mine.chunk(2, -1)
        torch.mm(F.silu(gate).mul_(up), down_proj[expert].t(), out=out[rows])
    hidden = x.new_empty(0, 0) if hidden is None else hidden
    return out, order, tokens, _inverse(order).view_as(experts), hidden, counts


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

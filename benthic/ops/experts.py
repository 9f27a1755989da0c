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


def routed_experts(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t], in x's dtype.

    `gate_up_proj` [E, 2F, D] holds gate rows, then up rows. An expert without tokens costs nothing and gets a zero
    gradient.
    """
    if x.device.type == "cpu":
        if len(x) == 1 and not torch.is_grad_enabled():
            return _one_token(x, experts, weights, gate_up_proj, down_proj)
        # grouped_mm is itself a loop on the processor: no faster in training, by and large, and slower in
        # decoding. It keeps every intermediate for backward, and takes no width that is not whole 16 bytes.
        return _ExpertLoop.apply(x, experts, weights, gate_up_proj, down_proj)
    # One launch for all experts, and no wait for the counts to reach the processor.
    return _grouped(x, experts, weights, gate_up_proj, down_proj)


def _grouped(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    _check_widths(gate_up_proj, down_proj)
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)  # [T K]
    counts = torch.zeros(len(gate_up_proj), dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    # Every row belongs to an expert, so the last offset is T K: no rows are left undefined.
    offsets = counts.cumsum(0).to(torch.int32)
    rows = x.index_select(0, order // experts.shape[1])
    hidden = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=offsets)  # [T K, 2F]
    gate, up = hidden.chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=offsets)  # [T K, D]
    out = out.index_select(0, _inverse(order)).view(*experts.shape, -1)  # [T, K, D]
    return (out.float() * weights[..., None]).sum(1).type_as(x)


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

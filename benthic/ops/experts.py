"""The routed experts' outputs, weighted and summed. Reference: numerics/reference/experts.py.

Tokens are sorted by expert, each expert multiplies its own rows, and a token's K results are summed in float32 in the
order of its choices: the same result on every run, whatever the load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t]: [T, D] in x's dtype.

    `x` [T, D], `experts` int64 [T, K], `weights` float32 [T, K], `gate_up_proj` [E, 2F, D] (gate rows, then up rows),
    `down_proj` [E, D, F]. An expert without tokens costs nothing and gets a zero gradient.
    """
    if x.device.type == "cpu":
        # A loop: one expert's rows stay in cache from the gather to the last product, and decoding touches only the
        # chosen experts. grouped_mm is itself a loop here, over arrays that fall out of the cache.
        return _ExpertLoop.apply(x, experts, weights, gate_up_proj, down_proj)
    # One launch for all experts, and no wait for the counts to reach the processor.
    return _grouped(x, experts, weights, gate_up_proj, down_proj)


def _grouped(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
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


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _ExpertLoop(torch.autograd.Function):
    """Experts one after another. Keeps the first product's result and no more: the activation is computed again in
    backward, and d weights = <d y W_down, h> needs no expert's output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(gate_up_proj)).tolist()
        tokens = order // experts.shape[1]
        hidden = x.new_empty(len(order), gate_up_proj.shape[1])
        out = x.new_empty(len(order), x.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            rows = slice(start, start := start + count)
            torch.mm(x.index_select(0, tokens[rows]), gate_up_proj[expert].t(), out=hidden[rows])
            gate, up = hidden[rows].chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up), down_proj[expert].t(), out=out[rows])
        inverse = _inverse(order)
        ctx.save_for_backward(x, weights, gate_up_proj, down_proj, order, tokens, inverse, hidden)
        ctx.counts = counts
        return _sum_choices(out, inverse.view_as(experts), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up_proj, down_proj, order, tokens, inverse, hidden = ctx.saved_tensors
        grad_gate_up, grad_down = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        grad_rows = x.new_empty(len(order), x.shape[1])
        grad_weights = weights.new_empty(len(order))
        row_weights = weights.flatten().index_select(0, order)[:, None].type_as(x)
        start = 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()
                continue
            rows = slice(start, start := start + count)
            grad_out, inputs = grad.index_select(0, tokens[rows]), x.index_select(0, tokens[rows])
            gate, up = hidden[rows].chunk(2, -1)
            gated = F.silu(gate)
            active = gated * up
            grad_active = grad_out @ down_proj[expert]
            torch.sum((grad_active * active).float(), -1, out=grad_weights[rows])
            torch.mm(grad_out.t(), active.mul_(row_weights[rows]), out=grad_down[expert])
            grad_active.mul_(row_weights[rows])
            grad_gate = torch.ops.aten.silu_backward(grad_active * up, gate)
            grad_hidden = torch.cat((grad_gate, grad_active.mul_(gated)), -1)
            torch.mm(grad_hidden.t(), inputs, out=grad_gate_up[expert])
            torch.mm(grad_hidden, gate_up_proj[expert], out=grad_rows[rows])
        inverse = inverse.view_as(weights)
        grad_x = _sum_choices(grad_rows, inverse, None)
        return grad_x, None, grad_weights[inverse], grad_gate_up, grad_down


def _sum_choices(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * rows[places[t, k]], in float32: [T, D] in rows' dtype."""
    picked = rows.index_select(0, places.flatten()).view(*places.shape, -1).float()
    if weights is None:
        return picked.sum(1).type_as(rows)
    return torch.bmm(weights[:, None], picked)[:, 0].type_as(rows)

"""Tokens brought into the order of their experts, and back, in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor


def sort_by_expert(
    experts: Int64[Tensor, "tokens chosen"], num_experts: int
) -> tuple[Int64[Tensor, " rows"], Int64[Tensor, "tokens chosen"], Int32[Tensor, " experts"]]:
    """A stable sort of the T K choices: tokens of the rows, rows of the choices, and where each expert's rows end."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)  # [T K]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(num_experts, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    return order // experts.shape[1], places.view_as(experts), counts.cumsum(0).to(torch.int32)


def take_rows(x: Float[Tensor, "tokens width"], places: Int64[Tensor, "tokens chosen"]) -> Float[Tensor, "rows width"]:
    """rows[places[t, k]] = x[t]."""
    rows = x.new_empty(places.numel(), x.shape[1])
    rows[places] = x[:, None]
    return rows


def sum_choices(
    rows: Float[Tensor, "rows width"],
    places: Int64[Tensor, "tokens chosen"],
    residual: Float[Tensor, "tokens width"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k rows[places[t, k]], plus residual[t], in float32 and in this order; in rows' dtype."""
    total = torch.zeros(len(places), rows.shape[1], device=rows.device)
    for place in places.unbind(1):
        total += rows[place]
    return (total if residual is None else total + residual).type_as(rows)

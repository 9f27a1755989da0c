"""Tokens brought into the order of their experts, and back, in plain torch. A choice of -1 is none, its place -1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor


def sort_by_expert(
    experts: Int64[Tensor, "tokens chosen"], num_experts: int, count: int | None = None
) -> tuple[Int64[Tensor, " rows"], Int64[Tensor, "tokens chosen"], Int32[Tensor, " experts"]]:
    """A stable sort of the choices: tokens of the rows, rows of the choices, and where each expert's rows end. There
    are `count` rows; where it is None T K, of which those past the last end mean nothing."""
    chosen = experts.flatten()
    chosen = chosen.masked_fill(chosen < 0, num_experts)
    order = chosen.argsort(stable=True)  # [T K]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    tokens = (order // experts.shape[1])[:count]
    places = places.masked_fill(chosen == num_experts, -1).view_as(experts)
    return tokens, places, counts[:-1].cumsum(0).to(torch.int32)


def take_rows(
    x: Float[Tensor, "tokens width"], places: Int64[Tensor, "tokens chosen"], count: int | None = None
) -> Float[Tensor, "rows width"]:
    """rows[places[t, k]] = x[t], of `count` rows; None: T K."""
    count = places.numel() if count is None else count
    rows = x.new_empty(count + 1, x.shape[1])  # -1 is one past the last
    rows[places] = x[:, None]
    return rows[:count]


def sum_choices(
    rows: Float[Tensor, "rows width"],
    places: Int64[Tensor, "tokens chosen"],
    residual: Float[Tensor, "tokens width"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k rows[places[t, k]], plus residual[t], in float32 and in this order; in rows' dtype."""
    total = torch.zeros(len(places), rows.shape[1], device=rows.device)
    padded = F.pad(rows, (0, 0, 0, 1))  # -1 adds zeros
    for place in places.unbind(1):
        total += padded[place]
    return (total if residual is None else total + residual).type_as(rows)

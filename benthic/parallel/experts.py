"""An expert layer whose routed experts are spread over ranks. It has the parts of the layer it stands for under the
same names; its `experts` are this rank's own, and compute as they would in one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from benthic.ops.permutation import sort_by_expert, sum_choices, take_rows
from benthic.ops.route import Routing
from benthic.parallel.copies import Copies
from benthic.parallel.exchange import Journey, agree_on_splits, exchanged
from benthic.parallel.narrow_exchange import exchanged_float8


class ExchangedExpertLayer(nn.Module):
    """Router `gate` and `shared_experts` as on one process, and of the routed `experts` this rank's E / ranks
    consecutive ones; the other ranks of `group` hold the rest. With `copies`, a rank holds the experts in its places
    instead, and a choice goes to one of its expert's. `narrow`: the experts take rows in FP8, so rows travel in FP8."""

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        shared_experts: nn.Module | None,
        group: dist.ProcessGroup,
        narrow: bool = False,
        copies: Copies | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self._group, self._narrow, self.copies = group, narrow, copies

    def forward(
        self, x: Float[Tensor, "batch positions width"]
    ) -> tuple[Float[Tensor, "batch positions width"], Routing]:
        """The sum of both, and how the B S tokens of this rank were routed (experts numbered over all ranks)."""
        tokens = x.flatten(0, -2)  # [T, D]
        routing = self.gate(tokens)
        if self.copies is None:
            permutation = sort_by_expert(routing.experts, routing.scores.shape[-1])
        else:
            permutation = sort_by_expert(self.copies.of(routing.experts), self.copies.count)
        splits = agree_on_splits(permutation.ends.long().diff(prepend=permutation.ends.new_zeros(1)), self._group)
        weights = exchanged(_by_row(routing.weights, permutation.places), splits)[:, None]
        choice = Routing(weights, splits.experts[:, None], weights)  # a received row has one
        if self._narrow:
            rows, in_float8 = exchanged_float8(tokens, permutation, splits)  # [R, D]
            results = self.experts(rows, choice, None, in_float8)
        else:
            results = self.experts(exchanged(take_rows(tokens, permutation), splits), choice)
        journey = Journey(splits.reversed())
        under_way = journey.depart(results)
        # Results travel home, and in backward their gradients travel here, while the shared experts compute.
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        out = sum_choices(journey.arrive(under_way), permutation, shared)
        return out.view_as(x), routing


def _by_row(weights: Float[Tensor, "tokens chosen"], places: Tensor) -> Float[Tensor, " rows"]:
    """Each choice's weight at the row of that choice."""
    flat = weights.flatten()
    return torch.empty_like(flat).scatter(0, places.flatten(), flat)

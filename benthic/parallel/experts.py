"""An expert layer whose routed experts are spread over ranks. It has the parts of the layer it stands for under the
same names; its `experts` are this rank's own, and compute as they would in one process.

What comes back for a token from a rank is the sum over its experts there, made in float32 and sent in the model's
dtype; home adds up those of a token's ranks, in float32 and in the order of its first choices there. In float32 the
result is that of one process but for the order of sums.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from benthic.ops.float8 import quantise_activation
from benthic.ops.permutation import Permutation, first_rows, sort_by_expert, sum_choices, take_rows
from benthic.ops.route import Routing
from benthic.parallel.exchange import Agreement, Journey, Splits, exchanged
from benthic.parallel.narrow_exchange import exchanged_float8


class ExchangedExpertLayer(nn.Module):
    """Router `gate` and `shared_experts` as on one process, and of the routed `experts` this rank's E / ranks
    consecutive ones; the other ranks of `group` hold the rest. `narrow`: the experts take rows in FP8, so rows travel
    in FP8."""

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        shared_experts: nn.Module | None,
        group: dist.ProcessGroup,
        narrow: bool = False,
    ) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self._group, self._narrow = group, narrow

    def forward(
        self, x: Float[Tensor, "batch positions width"]
    ) -> tuple[Float[Tensor, "batch positions width"], Routing]:
        """The sum of both, and how the B S tokens of this rank were routed (experts numbered over all ranks)."""
        tokens = x.flatten(0, -2)  # [T, D]
        routing = self.gate(tokens)
        ranks, held = self._group.size(), routing.scores.shape[-1] // self._group.size()
        holders = routing.experts // held  # [T, K]
        towards = without_repeats(holders)
        agreement = Agreement(torch.stack((_count(towards, ranks), _count(holders, ranks)), 1), self._group)
        permutation = sort_by_expert(towards, ranks)  # of ranks, and at most K rows a token
        in_float8 = quantise_activation(tokens) if self._narrow else None
        splits = agreement.splits()
        permutation = first_rows(permutation, sum(splits.sent))
        choice = _local(_exchanged_choices(routing, permutation, splits), held, splits)
        if in_float8 is not None:
            rows, in_float8 = exchanged_float8(tokens, in_float8, permutation, splits)  # [R, D]
            results = self.experts(rows, choice, None, in_float8)
        else:
            results = self.experts(exchanged(take_rows(tokens, permutation), splits), choice)
        journey = Journey(splits.reversed())
        under_way = journey.depart(results)
        # Results travel home, and in backward their gradients travel here, while the shared experts compute.
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        out = sum_choices(journey.arrive(under_way), permutation, shared)
        return out.view_as(x), routing


def without_repeats(ranks: Int64[Tensor, "tokens chosen"]) -> Int64[Tensor, "tokens chosen"]:
    """Each token's ranks, -1 where an earlier choice has the same."""
    same = ranks[:, :, None] == ranks[:, None, :]  # [T, K, K]
    return ranks.masked_fill(same.tril(-1).any(-1), -1)


def _count(ranks: Tensor, size: int) -> Tensor:
    """How many choices each of `size` ranks has, int64; -1 is none's."""
    flat = ranks.flatten()
    found = flat.new_zeros(size + 1).scatter_add_(0, flat.remainder(size + 1), torch.ones_like(flat))
    return found[:size]


def _exchanged_choices(routing: Routing, permutation: Permutation, splits: Splits) -> tuple[Tensor, Tensor]:
    """Experts int64 and weights float32 [R, K] of the tokens whose rows come, all their choices."""
    both = torch.cat((routing.weights, routing.experts.float()), 1)  # whole numbers, exact
    weights, experts = exchanged(take_rows(both, permutation), splits).chunk(2, 1)
    return experts.detach().long(), weights


def _local(choices: tuple[Tensor, Tensor], held: int, splits: Splits) -> Routing:
    """This rank's part of them, its `held` experts counted from 0."""
    experts, weights = choices
    experts = experts - splits.group.rank() * held
    experts = experts.masked_fill((experts < 0) | (experts >= held), -1)
    return Routing(weights, experts, weights, splits.choices)

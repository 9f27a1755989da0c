"""Which rank holds which experts of a layer, with copies of the popular ones (DeepSeek-V3, section 3.4: redundant
experts).

A rank has some places for experts, together at least as many as there are experts. What is left over goes, one place
after another, to the expert whose copies have most to do; then copies are laid on the ranks that have least to do, the
heaviest first. Loads are measured, in tokens or anything else that grows with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from benthic.errors import ConfigError

Holdings = tuple[tuple[int, ...], ...]
"""For each rank the experts in its places."""


def place_experts(loads: Sequence[float], ranks: int, places: int) -> Holdings:
    """The experts of each of `ranks` ranks, `places` on each, no expert twice on one. Raises ConfigError for too few
    places, or more than a copy of everything."""
    experts = len(loads)
    if not experts <= ranks * places <= ranks * experts:
        raise ConfigError(
            f"{ranks} ranks with places for {places} experts each cannot hold {experts} experts",
            hint=f"choose {-(-experts // ranks)} to {experts} places a rank",
        )
    copies = [1] * experts
    for _ in range(ranks * places - experts):
        copies[max((e for e in range(experts) if copies[e] < ranks), key=lambda e: (loads[e] / copies[e], -e))] += 1
    held: list[list[int]] = [[] for _ in range(ranks)]
    burden = [0.0] * ranks
    for expert in sorted(range(experts), key=lambda e: (-loads[e] / copies[e], e)):
        for _ in range(copies[expert]):
            _lay(expert, loads, copies, held, burden, places)
    return tuple(tuple(sorted(one)) for one in held)


def _lay(
    expert: int, loads: Sequence[float], copies: list[int], held: list[list[int]], burden: list[float], places: int
) -> None:
    """One copy, on the rank with least to do that has a place and no copy yet. Where only ranks with one have a place,
    another expert moves there and makes room."""
    free = [rank for rank, one in enumerate(held) if len(one) < places]
    fitting = [rank for rank in free if expert not in held[rank]]
    if fitting:
        rank = min(fitting, key=lambda rank: (burden[rank], rank))
    else:
        rank = min((rank for rank, one in enumerate(held) if expert not in one), key=lambda rank: (burden[rank], rank))
        moved = next(one for one in held[rank] if one not in held[free[0]])
        held[rank].remove(moved)
        held[free[0]].append(moved)
        burden[rank] -= loads[moved] / copies[moved]
        burden[free[0]] += loads[moved] / copies[moved]
    held[rank].append(expert)
    burden[rank] += loads[expert] / copies[expert]


class Copies:
    """The places of a layer's experts as rank `rank` sees them: its own copy of an expert before all others, else the
    copies in turn. Place p of rank r is number r x places + p."""

    def __init__(self, held: Holdings, rank: int, device: torch.device) -> None:
        self.places = len(held[0])
        self.count = len(held) * self.places
        where: dict[int, list[int]] = {}
        for owner, experts in enumerate(held):
            for place, expert in enumerate(experts):
                where.setdefault(expert, []).append(owner * self.places + place)
        own = range(rank * self.places, (rank + 1) * self.places)
        seen = [[place for place in where[e] if place in own] or where[e] for e in range(len(where))]
        widest = max(map(len, seen))
        self._numbers = torch.tensor([one + [0] * (widest - len(one)) for one in seen], device=device)
        self._counts = torch.tensor([len(one) for one in seen], device=device)

    def of(self, experts: Int64[Tensor, "tokens chosen"]) -> Int64[Tensor, "tokens chosen"]:
        """The place that each choice of an expert goes to."""
        turn = torch.arange(len(experts), device=experts.device)[:, None] % self._counts[experts]
        return self._numbers[experts, turn]

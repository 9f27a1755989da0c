"""Which positions of a sequence a rank trains on: plain arithmetic, no process needed.

Context ranks cut every sequence into 2c equal stretches, and rank r takes the r-th from the front and the r-th from the
back. A query of a late stretch looks at many keys and one of an early stretch at few, so every rank has 2c + 1
stretches of keys to look at, whatever its place:

    context=2      stretch   0  1  2  3
                   rank      0  1  1  0

Tensor ranks work on the same positions, and outside of attention and feed-forward each on its piece of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one rank has of sequences of `length` positions: those of the context rank `context_rank` of `context`,
    and of them, outside of sublayers, the piece `tensor_rank` of `tensor`."""

    length: int
    context: int = 1
    context_rank: int = 0
    tensor: int = 1
    tensor_rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """The context ranks, where they are processes."""

    @cached_property
    def stretches(self) -> tuple[range, ...]:
        """The context rank's positions, in order."""
        if self.context == 1:
            return (range(self.length),)
        size = self.length // (2 * self.context)
        front, back = self.context_rank, 2 * self.context - 1 - self.context_rank
        return tuple(range(place * size, (place + 1) * size) for place in (front, back))

    def positions(self, device: torch.device) -> Int64[Tensor, " positions"]:
        """The same as numbers."""
        return torch.cat([torch.arange(one.start, one.stop, device=device) for one in self.stretches])

    def select(self, values: Int64[Tensor, "batch _positions"], fill: int) -> Int64[Tensor, "batch positions"]:
        """Of values of the first positions those of the context rank's, and `fill` where there are none."""
        return F.pad(values, (0, self.length - values.shape[1]), value=fill)[:, self.positions(values.device)]

    def counted(self, depth: int) -> int:
        """How many rows of this rank's piece have a token `depth` further on; they are its first."""
        places = [place for stretch in self.stretches for place in stretch]
        held = len(places) // self.tensor
        piece = places[self.tensor_rank * held : (self.tensor_rank + 1) * held]
        return sum(place + depth < self.length for place in piece)

    def order(self) -> list[int]:
        """Where each stretch of a sequence stands when those of all context ranks are laid one behind the other."""
        last = 2 * self.context - 1
        return [2 * min(place, last - place) + (place > last - place) for place in range(last + 1)]


@dataclass(frozen=True, slots=True)
class Whole:
    """The sequences that one rank has a part of: `length` positions each; `add_up` sums a tensor, in place, over the
    ranks that have the parts, and returns it."""

    length: int
    add_up: Callable[[Tensor], Tensor]

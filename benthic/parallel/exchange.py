"""Expert exchange: every token's row to the ranks that hold its experts, and the results back.

A rank sorts its T K rows by expert, and experts lie over the ranks in order, so that what goes to one rank is one
piece. How long the pieces are is told first, by a small all-to-all; then rows travel by all_to_all_single with uneven
splits, and their gradients the other way. Received rows stand source by source; sorting them by expert is the local
computation's own. Nothing is padded and nothing dropped, and a token's K results are summed at home in the order of
its choices, so the numbers are those of one process that holds all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Splits:
    """One exchange: how many rows go to and come from each rank of `group`; `experts` int64 [R] says which of its own
    experts each received row is for, counted from 0."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    experts: Tensor

    def reversed(self) -> Splits:
        """The same pieces the other way."""
        return Splits(self.group, self.received, self.sent, self.experts)


def agree_on_splits(counts: Tensor, group: dist.ProcessGroup) -> Splits:
    """Tell each rank how many rows it will get for each of its experts: `counts` int64 [E], this rank's by expert.

    The lengths of messages are numbers of the host, so a GPU is waited for here, once an exchange.
    """
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = torch.stack((counts, arriving)).view(2, group.size(), -1).sum(-1).tolist()
    held = torch.arange(len(counts) // group.size(), device=counts.device).repeat(group.size())
    return Splits(group, sent, received, held.repeat_interleave(arriving, output_size=sum(received)))


class Journey:
    """Rows under way, between two nodes of the autograd graph: what is computed between the two overlaps with the
    messages. Forward starts in `depart` and ends in `arrive`; backward starts in arrive and ends in depart."""

    def __init__(self, splits: Splits) -> None:
        self._splits = splits
        self._leaving: Tensor | None = None
        self._arriving: Tensor | None = None
        self._work: dist.Work | None = None

    def depart(self, rows: Tensor) -> Tensor:
        """Start sending `rows` [sum of sent, ...]; the result is for `arrive` alone to read."""
        return _Depart.apply(rows, self)

    def arrive(self, under_way: Tensor) -> Tensor:
        """The rows that came, [sum of received, ...]."""
        return _Arrive.apply(under_way, self)

    def start(self, rows: Tensor, splits: Splits) -> Tensor:
        """Begin one exchange; `end` hands over the result."""
        self._leaving = rows.contiguous()  # lives until it is sent
        self._arriving = rows.new_empty(sum(splits.received), *rows.shape[1:])
        self._work = dist.all_to_all_single(
            self._arriving, self._leaving, splits.received, splits.sent, group=splits.group, async_op=True
        )
        return self._arriving

    def end(self) -> Tensor:
        """Wait: the host on a processor, the current stream on a GPU."""
        work, arrived = self._work, self._arriving
        if work is None or arrived is None:
            raise RuntimeError("an exchange ended that had not begun")
        work.wait()
        self._leaving = self._arriving = self._work = None
        return arrived

    def start_forward(self, rows: Tensor) -> Tensor:
        """Rows to their experts, or results home."""
        return self.start(rows, self._splits)

    def start_backward(self, gradient: Tensor) -> None:
        """Gradients back along the same way."""
        self.start(gradient, self._splits.reversed())


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.start_forward(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return ctx.journey.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.end()
        return under_way.view_as(under_way)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (gradient,) = grad_outputs
        ctx.journey.start_backward(gradient)
        # A gradient of the right shape for the graph's sake: `_Depart` takes the one that arrives.
        return gradient, None


def exchanged(rows: Tensor, splits: Splits) -> Tensor:
    """Rows sent and waited for at once."""
    journey = Journey(splits)
    return journey.arrive(journey.depart(rows))

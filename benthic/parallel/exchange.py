"""Expert exchange: a token's row to the ranks that hold its experts, and what they make of it back.

A row goes once to each rank that holds any of a token's experts, however many (DeepSeek-V3, section 3.2.2, sends it
once to a node), and one sum comes back from each. Rows are sorted by rank, so that what goes to one is one piece. How
long the pieces are is told first, by a small all-to-all; then rows travel by all_to_all_single with uneven splits, and
their gradients the other way. Received rows stand source by source. Nothing is padded and nothing dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Splits:
    """One exchange: how many rows go to and come from each rank of `group`, and how many `choices` of experts there are
    in all that come."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    choices: int

    def reversed(self) -> Splits:
        """The same pieces the other way."""
        return Splits(self.group, self.received, self.sent, self.choices)


class Agreement:
    """Each rank tells each how many rows, and choices of its experts, it will send: `counts` int64 [ranks, 2].

    The lengths of messages and arrays are numbers of the host, so that it must wait for a GPU once an exchange, and
    does in `splits`. The telling has streams of its own and starts at once: what is enqueued between the two does not
    delay it, and keeps the GPU busy while the host waits.
    """

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self._group, self._counts, self._arriving = group, counts, torch.empty_like(counts)
        self._told: torch.cuda.Event | None = None
        if not counts.is_cuda:
            self._work = self._tell()
            return
        stream = _telling(counts.device)
        stream.wait_stream(torch.cuda.current_stream(counts.device))
        with torch.cuda.stream(stream):
            self._tell().wait()
            self._numbers = torch.stack((counts, self._arriving)).to("cpu", non_blocking=True)
            self._told = torch.cuda.Event()
            self._told.record(stream)

    def _tell(self) -> dist.Work:
        work = dist.all_to_all_single(self._arriving, self._counts, group=self._group, async_op=True)
        if work is None:
            raise RuntimeError("this process is no rank of the group that exchanges rows")
        return work

    def splits(self) -> Splits:
        """Wait until all have told."""
        if self._told is None:
            self._work.wait()
            self._numbers = torch.stack((self._counts, self._arriving))
        else:
            self._told.synchronize()
        sent, received = self._numbers.tolist()
        choices = sum(choices for _, choices in received)
        return Splits(self._group, [rows for rows, _ in sent], [rows for rows, _ in received], choices)


@lru_cache
def _telling(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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

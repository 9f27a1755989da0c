"""Expert exchange: every token's row to the ranks that hold its experts, and the results back.

A rank sorts its T K rows by expert, and experts lie over the ranks in order, so that what goes to one rank is one
piece. How long the pieces are is told first (one small all-to-all); then rows travel by all_to_all_single with uneven
splits, forward and, in backward, the other way. Received rows stand source by source; a second sort, by expert, is the
local computation's own. Nothing is padded and nothing dropped, and a token's K results are summed at home in the order
of its choices: the numbers are those of one process that holds all experts.
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


def agree_on_splits(counts: Tensor, group: dist.ProcessGroup) -> Splits:
    """Tell each rank how many rows it will get for each of its experts: `counts` int64 [E], this rank's by expert.

    Sizes of messages are numbers of the host, so a GPU is waited for here, once an exchange.
    """
    ranks = group.size()
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    by_rank = torch.stack((counts.view(ranks, -1).sum(1), arriving.view(ranks, -1).sum(1)))
    sent, received = by_rank.tolist()
    held = torch.arange(len(counts) // ranks, device=counts.device).repeat(ranks)
    return Splits(group, sent, received, held.repeat_interleave(arriving, output_size=sum(received)))


def send_rows(rows: Tensor, splits: Splits) -> Tensor:
    """Rows sorted by expert, [T K, ...], to the ranks of their experts: what this rank gets, [R, ...]."""
    return _Sent.apply(rows, splits, False)


def return_rows(rows: Tensor, splits: Splits) -> tuple[Tensor, Arrival]:
    """Results [R, ...] back to where their rows came from, begun: the [T K, ...] may be read after `arrived`."""
    arrival = Arrival()
    return _Sent.apply(rows, splits, True, arrival), arrival


class Arrival:
    """Messages under way, between the two nodes of autograd that begin and end their exchange.

    Forward begins in the first node and ends in the second; backward begins in the second and ends in the first. What
    is computed between the nodes overlaps with the messages both times.
    """

    def __init__(self) -> None:
        self.work: dist.Work | None = None
        self.held: Tensor | None = None

    def begin(self, rows: Tensor, splits: Splits, back: bool) -> Tensor:
        """Start sending; the result is not to be read before `wait`."""
        there, here = (splits.sent, splits.received) if back else (splits.received, splits.sent)
        rows = rows.contiguous()
        out = rows.new_empty(sum(there), *rows.shape[1:])
        self.work = dist.all_to_all_single(out, rows, there, here, group=splits.group, async_op=True)
        self.held = rows  # what is being read must live until it is sent
        return out

    def wait(self) -> None:
        """Let what follows on this stream read what was begun."""
        if self.work is None:
            raise RuntimeError("an exchange was waited for twice, or never begun")
        self.work.wait()
        self.work = self.held = None

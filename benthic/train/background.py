"""Saving beside training: a copy of the state in the processor's memory, and a thread that writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from benthic.train.state import State


class Background:
    """One piece of work at a time; what it raises is raised where it is waited for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._work: Future[object] | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Start `work` when what was begun before has ended."""
        self.finish()
        self._work = self._thread.submit(work)

    def finish(self) -> None:
        """Wait for what was begun."""
        if self._work is not None:
            work, self._work = self._work, None
            work.result()


@torch.no_grad()
def aside(state: State) -> State:
    """`state` as it is now, in memory that updates do not change. All of a GPU's tensors are on their way at once."""
    copies = replace(
        state,
        weights=_copied(state.weights),
        moments=_copied(state.moments),
        average=None if state.average is None else _copied(state.average),
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(tensor.detach()) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)

"""Tensors that live in the processor's memory and visit the GPU a piece at a time, while it works on another piece.

Three places on the GPU take turns: one is being filled, one computed on, one emptied. Each way of the bus has a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE = 1 << 24
"""Elements of a piece: tens of MiB, which the bus moves at its full rate."""
_PLACES = 3


class Lanes:
    """The copies of a device where everything happens in order: a processor."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` where it will live."""
        return tensor.cpu().clone()

    def pieces(self, count: int, piece: int = PIECE) -> Iterator[slice]:
        """`count` elements in slices."""
        for start in range(0, count, piece):
            yield slice(start, min(start + piece, count))

    @contextmanager
    def visiting(self, kept: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Copies of the flat tensors `kept` on the device; what they hold at the end of the block is written back."""
        placed = [one.clone() for one in kept]
        yield placed
        for one, visitor in zip(kept, placed, strict=True):
            one.copy_(visitor)

    def finish(self) -> None:
        """All that is enqueued on the device after this comes after the last copy."""


class GpuLanes(Lanes):
    """Copies on their own streams of `device`, between pinned memory and places that take turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._places: list[dict[tuple[int, torch.dtype], Tensor]] = [{} for _ in range(_PLACES)]
        self._emptied = [torch.cuda.Event() for _ in range(_PLACES)]
        self._turn = 0

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory()

    @contextmanager
    def visiting(self, kept: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        computing = torch.cuda.current_stream(self._device)
        turn, self._turn = self._turn, (self._turn + 1) % _PLACES
        placed = [self._place(turn, index, one) for index, one in enumerate(kept)]
        self._to.wait_event(self._emptied[turn])
        with torch.cuda.stream(self._to):
            for one, visitor in zip(kept, placed, strict=True):
                visitor.copy_(one, non_blocking=True)
        computing.wait_stream(self._to)
        yield placed
        self._back.wait_stream(computing)
        with torch.cuda.stream(self._back):
            for one, visitor in zip(kept, placed, strict=True):
                one.copy_(visitor, non_blocking=True)
        self._emptied[turn].record(self._back)

    def _place(self, turn: int, index: int, like: Tensor) -> Tensor:
        """A buffer kept for good, so that no stream's memory is given to another while it is in use."""
        places, key = self._places[turn], (index, like.dtype)
        if key not in places:
            places[key] = torch.empty(PIECE, dtype=like.dtype, device=self._device)
            # Its memory may have been something else's, which the computing stream has yet to finish with.
            self._to.wait_stream(torch.cuda.current_stream(self._device))
        return places[key][: like.numel()]

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._back)
        self._to.wait_stream(self._back)


def lanes_of(device: torch.device) -> Lanes:
    """The lanes that fit `device`."""
    return GpuLanes(device) if device.type == "cuda" else Lanes()

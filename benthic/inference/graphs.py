"""Decoding without launches: calls of the model captured as CUDA graphs, by the size of the batch.

A decoding step is a thousand small kernels, whose launches take longer than the kernels. A graph is captured when a
size first comes, and replayed from then on: sizes are rounded up, and what is added belongs to no sequence, is written
nowhere and sees no key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benthic.inference.batch import Stretch, bounds_of, rows_of
from benthic.model.pages import Pages

MOST_ROWS = 512
"""Larger calls keep the GPU busy longer than their launches take."""
_WIDEST_STRETCH = 17
"""A token and the most drafts behind it. Longer ones are pieces of prompts, which take another path."""
_LEAST_BLOCKS = 32
PATIENCE = 16
"""Calls of a new size that a larger graph serves before the size gets its own: a capture stops everything for longer
than rows for nobody cost, and many sizes come once, while answers end one by one."""


def suits(stretches: Sequence[Stretch]) -> bool:
    """Whether a call of `stretches` is one that comes again and again."""
    longest = len(stretches[-1].tokens)
    return longest <= _WIDEST_STRETCH and sum(len(stretch.tokens) for stretch in stretches) <= MOST_ROWS


class _Size(NamedTuple):
    """What a graph is captured for: rows, sequences, and blocks of each."""

    rows: int
    sequences: int
    blocks: int

    def fits(self, other: _Size) -> bool:
        """Whether a graph of `other` can do it."""
        return all(mine <= its for mine, its in zip(self, other, strict=True))


def _size(stretches: Sequence[Stretch]) -> _Size:
    """Where tokens come in twos and threes, all count as many as the longest: how many drafts were right is chance, and
    every chance would be a size of its own."""
    count, rows = len(stretches), sum(len(stretch.tokens) for stretch in stretches)
    even = count * len(stretches[-1].tokens)
    rows = _rounded(even if even <= min(2 * rows, MOST_ROWS) else rows)
    blocks = max(_LEAST_BLOCKS, 1 << (max(len(stretch.blocks) for stretch in stretches) - 1).bit_length())
    return _Size(rows, min(rows, _rounded(count)), blocks)


class Graphs:
    """Captured calls of one function of (tokens [T], known [T, D] or None, pages)."""

    def __init__(
        self,
        call: Callable[[Tensor, Tensor | None, Pages], Any],
        pools: Sequence[Tensor],
        block_size: int,
        memory: Any,
        first: int = 0,
    ) -> None:
        self._call, self._pools, self._block_size = call, pools, block_size
        self._memory, self._first = memory, first
        self._captured: dict[_Size, _Captured] = {}
        self._asked: Counter[_Size] = Counter()

    def run(
        self,
        stretches: Sequence[Stretch],
        known: Tensor | None = None,
        source: tuple[Tensor, Sequence[int]] | None = None,
    ) -> Any:
        """What the function returns, for rounded-up rows; valid until the next run of this size or of less. With a
        `source`, token i is not that of the stretches but stands in row source[1][i] of source[0], on the device."""
        size = _size(stretches)
        captured = self._captured.get(size) or self._stand_in(size)
        if captured is None:
            states = None if known is None else known.new_zeros(size.rows, known.shape[1])
            inputs = _Inputs(size, self._pools, self._block_size, self._first, states)
            inputs.fill(stretches, known, source)
            captured = self._captured[size] = _Captured(self._call, inputs, self._memory)
        captured.inputs.fill(stretches, known, source)
        captured.graph.replay()
        return captured.result

    def _stand_in(self, size: _Size) -> _Captured | None:
        """The graph of a larger size, for a while."""
        self._asked[size] += 1
        larger = [one for one in self._captured if size.fits(one) and one.rows <= 2 * size.rows]
        return self._captured[min(larger)] if larger and self._asked[size] <= PATIENCE else None


class _Inputs:
    """The tensors that a captured call reads, and what they were last filled with.

    Token ids, positions, slots and sources of rows, int64 [4, T], then bounds and lengths of sequences, then tables lie
    in one piece of memory, so that one copy fills them. It comes from one of two pieces of the host's, in turn: the
    next step is filled in while the copy of this one may still wait for the device.
    """

    def __init__(self, size: _Size, pools: Sequence[Tensor], block_size: int, first: int, known: Tensor | None) -> None:
        rows, sequences, blocks = size
        self._device, self._block_size = pools[0].device, block_size
        # Rows begin at 16 bytes: kernels are compiled anew where one does not.
        self._shapes = (4, rows + rows % 2), (2, (sequences + 4) // 4 * 4), (sequences, blocks)
        self._host_tables = np.zeros((sequences, blocks), np.int32)
        self._filled: list[tuple[Sequence[int], int]] = [((), 0)] * sequences
        (height, width), (_, bounds), _ = self._shapes
        self._head = 2 * height * width + 2 * bounds
        count = self._head + sequences * blocks
        self._whole = torch.zeros(count, dtype=torch.int32, device=self._device)
        pinned = self._device.type == "cuda"
        pieces = [torch.zeros(count, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._staging = [(piece, *(part.numpy() for part in self._parts(piece))) for piece in pieces]
        self._rows, self._bounds, tables = self._parts(self._whole)
        self.known = known
        self.tokens = self._rows[0, :rows]
        self.pages = Pages(
            pools=pools,
            # All sequences are narrow; how many rows each really has, the device alone knows.
            counts=(1,) * sequences,
            totals=(1,) * sequences,
            bounds=(*range(sequences), rows),
            positions=self._rows[1, :rows],
            slots=self._rows[2, :rows],
            tables=tables,
            starts=self._bounds[0, : sequences + 1],
            lengths=self._bounds[1, :sequences],
            first=first,
        )

    def fill(
        self,
        stretches: Sequence[Stretch],
        known: Tensor | None,
        source: tuple[Tensor, Sequence[int]] | None = None,
    ) -> None:
        """Take the place of the values before."""
        self._staging.reverse()
        staged, rows, bounds, tables = self._staging[0]
        found = rows_of(stretches, self._block_size).numpy()
        count, ends = found.shape[1], bounds_of(stretches)
        rows[:3, :count], rows[:2, count:], rows[2, count:] = found, 0, -1
        bounds[0, : len(ends)], bounds[0, len(ends) :] = ends, ends[-1]
        bounds[1, : len(stretches)] = [stretch.start + len(stretch.tokens) for stretch in stretches]
        bounds[1, len(stretches) :] = 0
        if source is not None:
            rows[3, :count] = source[1]
        copied = self._head
        if self._fill_tables(stretches):
            tables[:] = self._host_tables
            copied = len(staged)
        self._whole[:copied].copy_(staged[:copied], non_blocking=True)
        if source is not None:
            torch.index_select(source[0], 0, self._rows[3, :count], out=self.tokens[:count])
        if self.known is not None and known is not None:
            self.known[: len(known)].copy_(known)

    def _parts(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, bounds and tables in a piece of memory."""
        (height, width), bounds, tables = self._shapes
        end = 2 * height * width
        rows = whole[:end].view(torch.int64).view(height, width)
        return rows, whole[end : self._head].view(bounds), whole[self._head :].view(tables)

    def _fill_tables(self, stretches: Sequence[Stretch]) -> bool:
        """Whether anything is new. A sequence's list of blocks only grows, so what is there of the same list stays."""
        changed = False
        for place, stretch in enumerate(stretches):
            blocks, (last, length) = stretch.blocks, self._filled[place]
            length = length if last is blocks else 0
            if len(blocks) > length:
                self._host_tables[place, length : len(blocks)] = blocks[length:]
                self._filled[place] = (blocks, len(blocks))
                changed = True
        return changed


class _Captured:
    """One graph with the tensors it reads and those it leaves."""

    def __init__(self, call: Callable[[Tensor, Tensor | None, Pages], Any], inputs: _Inputs, memory: Any) -> None:
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled and workspaces made at the first call, which no graph may contain.
            call(inputs.tokens, inputs.known, inputs.pages)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            self.result = call(inputs.tokens, inputs.known, inputs.pages)


def _rounded(count: int) -> int:
    """Up to 16 as it is, then to at most an eighth more: what is added chooses experts too, whose weights are read."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step

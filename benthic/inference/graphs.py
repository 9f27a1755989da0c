"""Decoding without launches: calls of the model captured as CUDA graphs, by the size of the batch.

A decoding step is a thousand small kernels, whose launches take longer than the kernels. A graph is captured when a
size first comes, and replayed from then on: sizes are rounded up, and what is added belongs to no sequence, is written
nowhere and sees no key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def suits(stretches: Sequence[Stretch]) -> bool:
    """Whether a call of `stretches` is one that comes again and again."""
    longest = len(stretches[-1].tokens)
    return longest <= _WIDEST_STRETCH and sum(len(stretch.tokens) for stretch in stretches) <= MOST_ROWS


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
        self._captured: dict[tuple[int, int, int], _Captured] = {}

    def run(self, stretches: Sequence[Stretch], known: Tensor | None = None) -> Any:
        """What the function returns, for rounded-up rows; valid until the next run of this size."""
        rows = _rounded(sum(len(stretch.tokens) for stretch in stretches))
        sequences = min(rows, _rounded(len(stretches)))
        blocks = max(_LEAST_BLOCKS, 1 << (max(len(stretch.blocks) for stretch in stretches) - 1).bit_length())
        size = (rows, sequences, blocks)
        if size not in self._captured:
            states = None if known is None else known.new_zeros(rows, known.shape[1])
            inputs = _Inputs(size, self._pools, self._block_size, self._first, states)
            inputs.fill(stretches, known)
            self._captured[size] = _Captured(self._call, inputs, self._memory)
        captured = self._captured[size]
        captured.inputs.fill(stretches, known)
        captured.graph.replay()
        return captured.result


class _Inputs:
    """The tensors that a captured call reads, and what they were last filled with."""

    def __init__(
        self, size: tuple[int, int, int], pools: Sequence[Tensor], block_size: int, first: int, known: Tensor | None
    ) -> None:
        rows, sequences, blocks = size
        device, self._block_size = pools[0].device, block_size
        # Rows begin at 16 bytes: kernels are compiled anew where one does not.
        self._tokens = torch.zeros(3, rows + rows % 2, dtype=torch.int64, device=device)
        self._bounds = torch.zeros(2, (sequences + 4) // 4 * 4, dtype=torch.int32, device=device)
        self._tables = torch.zeros(sequences, blocks, dtype=torch.int32, device=device)
        self._host_tables = np.zeros((sequences, blocks), np.int32)
        self._filled: list[tuple[Sequence[int], int]] = [((), 0)] * sequences
        self.known = known
        self.tokens = self._tokens[0, :rows]
        self.pages = Pages(
            pools=pools,
            # All sequences are narrow; how many rows each really has, the device alone knows.
            counts=(1,) * sequences,
            totals=(1,) * sequences,
            bounds=(*range(sequences), rows),
            positions=self._tokens[1, :rows],
            slots=self._tokens[2, :rows],
            tables=self._tables,
            starts=self._bounds[0, : sequences + 1],
            lengths=self._bounds[1, :sequences],
            first=first,
        )

    def fill(self, stretches: Sequence[Stretch], known: Tensor | None) -> None:
        """Take the place of the values before."""
        found = rows_of(stretches, self._block_size)
        rows = torch.zeros(self._tokens.shape, dtype=torch.int64)
        rows[2] = -1
        rows[:, : found.shape[1]] = found
        self._tokens.copy_(rows)
        bounds = bounds_of(stretches)
        host = np.zeros(tuple(self._bounds.shape), np.int32)
        host[0, : len(bounds)] = bounds
        host[0, len(bounds) :] = bounds[-1]
        host[1, : len(stretches)] = [stretch.start + len(stretch.tokens) for stretch in stretches]
        self._bounds.copy_(torch.from_numpy(host))
        if self._fill_tables(stretches):
            self._tables.copy_(torch.from_numpy(self._host_tables))
        if self.known is not None and known is not None:
            self.known[: len(known)].copy_(known)

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

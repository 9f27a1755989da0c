"""Loader: shuffled sequences without end, from a state of a few numbers.

The order of an epoch is a permutation computed from (seed, epoch), so that the number of sequences read so far says
everything: a run resumes exactly, with any batch size and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from benthic.data.packing import Batch, count_windows, cut
from benthic.data.permutation import permuted
from benthic.data.splitmix import key, mix
from benthic.data.tokens import TokenFile
from benthic.errors import DataError

__all__ = ["Batch", "Loader", "validation_batches"]


class Loader:
    """Sequences of one split for one rank. Ranks that make the same calls read neighbouring parts of one order."""

    def __init__(
        self, source: TokenFile, sequence_length: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is outside [0, {world_size})")
        self.sequence_length = sequence_length
        self.windows = count_windows(source, sequence_length)
        self._source = source
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._position = 0

    @property
    def position(self) -> int:
        """Sequences read by all ranks together since the run began."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the split so far."""
        return self._position / self.windows

    def next_batch(self, sequences: int) -> Batch:
        """The next `sequences` of this rank; the other ranks read as many beside it."""
        if sequences < 1:
            raise DataError(f"a batch of {sequences} sequences was asked for; at least 1 is allowed")
        first = self._position + self._rank * sequences
        self._position += sequences * self._world_size
        starts = self._starts(np.arange(first, first + sequences, dtype=np.int64))
        return cut(self._source, starts, self.sequence_length + 1)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, and what it is a place in."""
        return self._identity() | {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at `state`. DataError when it was saved over other data, another seed or sequence length."""
        expected = self._identity()
        for name, value in expected.items():
            if state.get(name) != value:
                raise DataError(
                    f"cannot resume the data order: {name} was {state.get(name)}, now it is {value}",
                    hint="resume with the data, seed and sequence length the run began with",
                )
        self._position = int(state["position"])

    def _identity(self) -> dict[str, int]:
        return {
            "tokens": self._source.facts.tokens,
            "sequence_length": self.sequence_length,
            "seed": self._seed,
        }

    def _starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        starts = np.empty_like(samples)
        epochs, index = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            order = permuted(index[chosen], self.windows, self._seed, epoch)
            starts[chosen] = order * self.sequence_length + self._rotation(epoch)
        return starts

    def _rotation(self, epoch: int) -> int:
        return mix(key(self._seed, epoch)) % self._source.facts.tokens


def validation_batches(
    source: TokenFile, sequence_length: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every token of `source` but its first as a label once, in the order of the text.

    Ranks take turns window by window. The last window is shorter and comes alone, in a batch of [1, 2 to S + 1].
    """
    tokens = source.facts.tokens
    if tokens < 2:
        raise DataError(f"{source.path} holds {tokens} tokens; validation needs at least 2")
    whole, left = divmod(tokens - 1, sequence_length)
    mine = np.arange(rank, whole, world_size, dtype=np.int64) * sequence_length
    for first in range(0, len(mine), batch_size):
        yield cut(source, mine[first : first + batch_size], sequence_length + 1)
    if left and whole % world_size == rank:
        yield cut(source, np.array([whole * sequence_length]), left + 1)

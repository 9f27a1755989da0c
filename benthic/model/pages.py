"""Where the tokens of a call stand in the paged cache: one pool of blocks a layer, shared by all sequences."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from benthic.config.model import ModelConfig


def make_pools(
    config: ModelConfig, blocks: int, block_size: int, device: torch.device | str, dtype: torch.dtype, layers: int
) -> list[Float[Tensor, "{blocks} {block_size} cache_width"]]:
    """Empty pools of the first `layers` layers, prediction layers behind the main ones. A row is what `Cache` keeps."""
    shape = (blocks, block_size, config.cache_width)
    # Zeros, not what the memory held: a NaN there would reach others through a weight of 0.
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]


@dataclass(frozen=True, slots=True)
class Pages:
    """T new tokens of B sequences, those with fewest new tokens first.

    `counts` new tokens and `totals` tokens with them are plain numbers, for choices on the host; the tensors say the
    same to kernels. `slots` are the rows of the new tokens (block x block_size + place), `tables` the blocks of each
    sequence, and keys before position `first` do not exist.
    """

    pools: Sequence[Float[Tensor, "blocks block width"]]
    counts: tuple[int, ...]
    totals: tuple[int, ...]
    bounds: tuple[int, ...]
    positions: Int64[Tensor, " tokens"]
    slots: Int64[Tensor, " tokens"]
    tables: Int32[Tensor, "sequences max_blocks"]
    starts: Int32[Tensor, " sequences+1"]
    lengths: Int32[Tensor, " sequences"]
    first: int = 0

    def narrower_than(self, rows: int) -> int:
        """How many sequences, all in front, have fewer new tokens than `rows`."""
        return bisect_left(self.counts, rows)

    def front(self, sequences: int) -> Pages:
        """The first `sequences` alone."""
        if sequences == len(self.counts):
            return self
        end = self.bounds[sequences]
        return replace(
            self,
            counts=self.counts[:sequences],
            totals=self.totals[:sequences],
            bounds=self.bounds[: sequences + 1],
            positions=self.positions[:end],
            slots=self.slots[:end],
            tables=self.tables[:sequences],
            starts=self.starts[: sequences + 1],
            lengths=self.lengths[:sequences],
        )

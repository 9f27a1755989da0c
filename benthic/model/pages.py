"""Where the tokens of a call stand in the paged cache: one pool of blocks a layer, shared by all sequences."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from benthic.config.engine import CacheStorage
from benthic.config.model import ModelConfig
from benthic.errors import ConfigError

FACTOR_BYTES = 16
"""Of a row in FP8: a float32 factor, filled up so that rows begin at 16 bytes."""


class RowFormat(NamedTuple):
    """How a token's row of one layer is stored."""

    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return self.width * self.dtype.itemsize


def row_format(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, storage: CacheStorage = "plain"
) -> RowFormat:
    """Rows as `Cache` keeps them, in a model's `dtype`; or bytes, latents in e4m3 with a factor for each row
    (numerics/reference/paged_latent_attention_fp8.py). Raises ConfigError where these do not fit."""
    if storage == "plain":
        return RowFormat(config.cache_width, dtype)
    if not config.kv_lora_rank:
        raise ConfigError(
            f"a float8 cache keeps latents; this model's attention is {config.attention_kind}",
            hint="leave cache at 'plain'",
        )
    if device.type == "cuda" and (dtype.itemsize != 2 or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ConfigError(
            f"a float8 cache needs a GPU of sm_89 or newer and a model of 16 bits; this is one of {dtype} on "
            f"{torch.cuda.get_device_name(device)}",
            hint="leave cache at 'plain', or load the model in torch.bfloat16",
        )
    width = config.kv_lora_rank + config.qk_rope_head_dim * dtype.itemsize + FACTOR_BYTES
    if width % 16:
        raise ConfigError(
            f"kv_lora_rank {config.kv_lora_rank} and qk_rope_head_dim {config.qk_rope_head_dim} make rows of {width} "
            "bytes; a float8 cache needs a multiple of 16",
            hint="leave cache at 'plain'",
        )
    return RowFormat(width, torch.uint8)


def make_pools(
    row: RowFormat, blocks: int, block_size: int, device: torch.device | str, layers: int
) -> list[Shaped[Tensor, "{blocks} {block_size} row"]]:
    """Empty pools of the first `layers` layers, prediction layers behind the main ones."""
    # Zeros, not what the memory held: a NaN there would reach others through a weight of 0.
    return [torch.zeros(blocks, block_size, row.width, device=device, dtype=row.dtype) for _ in range(layers)]


@dataclass(frozen=True, slots=True)
class Pages:
    """T new tokens of B sequences, those with fewest new tokens first.

    `counts` new tokens and `totals` tokens with them are plain numbers, for choices on the host; the tensors say the
    same to kernels. `slots` are the rows of the new tokens (block x block_size + place), `tables` the blocks of each
    sequence, and keys before position `first` do not exist.
    """

    pools: Sequence[Shaped[Tensor, "blocks block row"]]
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

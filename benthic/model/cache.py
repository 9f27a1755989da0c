"""What decoding remembers of the tokens before: one row a token and layer, `config.cache_width` numbers wide."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from benthic.config.model import ModelConfig
from benthic.errors import RequestError


class Cache:
    """Rows of `batch` sequences of equal length, up to `max_length` tokens.

    A row holds, for latent attention, the normalised latent [C] and the rotated key [R] that all heads share; else
    keys [Hk, Dq] and values [Hk, Dv]. `length` tokens are filled; the model moves it after all layers have written.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= max_length <= config.max_position_embeddings:
            raise RequestError(
                f"a cache of {max_length} positions was asked for; the model's max_position_embeddings allows 1 to "
                f"{config.max_position_embeddings}"
            )
        self.batch, self.max_length, self.length = batch, max_length, 0
        shape = (batch, max_length, config.cache_width)
        self._layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def write(
        self, layer: int, rows: Float[Tensor, "batch positions cache_width"]
    ) -> Float[Tensor, "batch {self.length}+positions cache_width"]:
        """Store `rows` behind what is filled; all rows up to and with them."""
        end = self.length + rows.shape[1]
        stored = self._layers[layer]
        stored[:, self.length : end] = rows
        return stored[:, :end]

    def check_room(self, batch: int, length: int) -> None:
        """Raise RequestError unless `length` more tokens of `batch` sequences fit."""
        if batch != self.batch:
            raise RequestError(f"input_ids holds {batch} sequences, but the cache was made for {self.batch}")
        if self.length + length > self.max_length:
            raise RequestError(
                f"the cache holds {self.length} of {self.max_length} positions; {length} more do not fit",
                hint="make it with a larger max_length",
            )

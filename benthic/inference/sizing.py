"""How many blocks the cache of an engine gets."""

from __future__ import annotations

import torch

from benthic.config.engine import EngineConfig
from benthic.config.model import ModelConfig
from benthic.errors import CapacityError
from benthic.model.pages import row_format
from benthic.model.room import available_bytes


def num_blocks(
    config: ModelConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype, include_mtp: bool
) -> int:
    """`engine.num_blocks`, or what its share of the free memory holds. Raises CapacityError where that is not even one
    block, or where the stated number does not fit."""
    predictions = config.num_nextn_predict_layers if include_mtp else 0
    row = row_format(config, dtype, device, engine.cache)
    block_bytes = engine.block_size * row.num_bytes * (config.num_hidden_layers + predictions)
    block_bytes += predictions * config.hidden_size * dtype.itemsize  # the states at the end of a block
    free = available_bytes(device)
    if engine.num_blocks is not None:
        if free is not None and engine.num_blocks * block_bytes > free:
            raise CapacityError(
                f"num_blocks {engine.num_blocks} of {engine.block_size} tokens need "
                f"{engine.num_blocks * block_bytes / 2**30:.2f} GiB; {device} has {free / 2**30:.2f} GiB available",
                hint=f"at most {free // block_bytes} fit",
            )
        return engine.num_blocks
    most = engine.max_sequences * -(-config.max_position_embeddings // engine.block_size)
    if free is None:
        return most
    fitting = int(free * engine.memory_share) // block_bytes
    if not fitting:
        raise CapacityError(
            f"a block of the cache takes {block_bytes / 2**20:.1f} MiB; {device} has {free / 2**20:.1f} MiB available",
            hint="choose a smaller model, or a smaller block_size",
        )
    return min(most, fitting)

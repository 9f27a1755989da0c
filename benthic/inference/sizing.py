"""How many blocks the cache of an engine gets."""

from __future__ import annotations

import torch

from benthic.config.engine import EngineConfig
from benthic.config.model import ModelConfig
from benthic.errors import CapacityError
from benthic.model.room import available_bytes
from benthic.plan.kv_cache import elements_per_token


def num_blocks(
    config: ModelConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype, include_mtp: bool
) -> int:
    """`engine.num_blocks`, or what its share of the free memory holds. Raises CapacityError where that is not even one
    block, or where the stated number does not fit."""
    elements = engine.block_size * elements_per_token(config, include_mtp=include_mtp)
    if include_mtp:
        elements += config.num_nextn_predict_layers * config.hidden_size  # the states at the end of a block
    block_bytes = elements * dtype.itemsize
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

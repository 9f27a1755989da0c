"""`benthic.load_model` and `benthic.save_model`: a published folder as a model, and back."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from benthic.checkpoint.reader import Checkpoint, load_into, open_checkpoint
from benthic.checkpoint.writer import MAX_SHARD_BYTES, WeightFormat, write_checkpoint
from benthic.config.engine import WeightStorage
from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.errors import CapacityError, ConfigError
from benthic.log import logger
from benthic.model import LanguageModel
from benthic.model.float8_storage import storage, store_in_float8, why_not_float8
from benthic.model.room import available_bytes


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    weights: WeightStorage = "plain",
) -> LanguageModel:
    """The model of a published folder, in eval mode; `dtype` defaults to the one that its config.json states.

    Takes one file or shards, fp32, bf16, fp16 or FP8, with or without prediction layers. Routing biases stay float32.
    `weights` "plain" are all in `dtype`; "float8" keeps matrices in FP8 (model/float8_storage.py), as they are stored
    or quantised as they come; "auto" does so where the folder stores FP8 and the device multiplies it. Raises, before
    any memory is taken, ConfigError or CheckpointError naming every fault of the folder, and CapacityError when the
    device is absent or too small.
    """
    checkpoint = open_checkpoint(folder)
    dtype = dtype or getattr(torch, checkpoint.config.dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"dtype is {dtype}; a model computes in torch.float32, torch.bfloat16 or torch.float16")
    device = _device(device)
    available = available_bytes(device)
    narrow = weights == "float8" or (weights == "auto" and _serves_float8(checkpoint, device, dtype))
    _refuse_small_device(weight_bytes(checkpoint.config, dtype, narrow), available, device, dtype)
    model = LanguageModel(checkpoint.config, device=torch.device("meta") if narrow else device, dtype=dtype)
    if narrow:
        refusal = why_not_float8(device, dtype)
        if refusal is not None:
            raise ConfigError(f"weights cannot be kept in float8: {refusal}", hint="leave weights at 'plain'")
        store_in_float8(model)
        model.to_empty(device=device)
    load_into(model, checkpoint)
    return model.eval()


def weight_bytes(config: ModelConfig, dtype: torch.dtype, in_float8: bool) -> int:
    """Bytes of a model's weights in memory, factors of those in FP8 included."""
    narrow = {row.name for row, reason in storage(config) if reason is None} if in_float8 else set()
    total = 0
    for row in parameters(config):
        if row.name in narrow:
            *stack, rows, columns = row.shape
            total += row.size + 4 * prod(stack) * -(-rows // 128) * -(-columns // 128)
        else:
            total += row.size * (4 if row.dtype == "float32" else dtype.itemsize)
    return total


def _serves_float8(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FP8 weights stay as they are stored where nobody said."""
    if checkpoint.config.quantization_config is None:
        return False
    refusal = "a processor multiplies float32 faster" if device.type == "cpu" else why_not_float8(device, dtype)
    if refusal is not None:
        logger.info("weights: stored in float8, given back in %s: %s", dtype, refusal)
    return refusal is None


def save_model(
    model: LanguageModel,
    folder: str | Path,
    weights: WeightFormat = "bf16",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    power_of_two_scales: bool = False,
) -> None:
    """Write `model` as a published folder that other engines load, prediction layers included; all or nothing.

    `weights` "fp8" is e4m3 in blocks of 128 x 128 with `weight_scale_inv`. Other files of the folder stay.
    """
    write_checkpoint(
        model.state_dict(),
        model.config,
        folder,
        weights,
        max_shard_bytes=max_shard_bytes,
        power_of_two_scales=power_of_two_scales,
    )


def _device(name: str | torch.device) -> torch.device:
    hint = "use 'cpu', 'cuda' or 'cuda:1'"
    if not isinstance(name, str | torch.device):
        raise ConfigError(f"device is {name!r}; it must be the name of one", hint=hint)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}: {error}", hint=hint) from None
    if device.type == "meta":
        raise ConfigError("device is 'meta', which holds no weights to compute with", hint=hint)
    return device


def _refuse_small_device(needed: int, available: int | None, device: torch.device, dtype: torch.dtype) -> None:
    if available is not None and needed > available:
        raise CapacityError(
            f"the model needs {needed / 2**30:.1f} GiB in {dtype}; {device} has {available / 2**30:.1f} GiB available",
            hint="load it in torch.bfloat16 where that is smaller, or choose a smaller model",
        )

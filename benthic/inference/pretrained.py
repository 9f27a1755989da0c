"""`benthic.load_model` and `benthic.save_model`: a published folder as a model, and back."""

from __future__ import annotations

from pathlib import Path

import torch

from benthic.checkpoint.reader import load_into, open_checkpoint
from benthic.checkpoint.writer import MAX_SHARD_BYTES, WeightFormat, write_checkpoint
from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.errors import CapacityError, ConfigError
from benthic.model import LanguageModel
from benthic.model.room import available_bytes


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a published folder, in eval mode; `dtype` defaults to the one that its config.json states.

    Takes one file or shards, fp32, bf16, fp16 or FP8 (dequantised), with or without prediction layers. Routing biases
    stay float32. Raises, before any memory is taken, ConfigError or CheckpointError naming every fault of the folder,
    and CapacityError when the device is absent or too small.
    """
    checkpoint = open_checkpoint(folder)
    dtype = dtype or getattr(torch, checkpoint.config.dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"dtype is {dtype}; a model computes in torch.float32, torch.bfloat16 or torch.float16")
    device = _device(device)
    _refuse_small_device(checkpoint.config, device, dtype)
    model = LanguageModel(checkpoint.config, device=device, dtype=dtype)
    load_into(model, checkpoint)
    return model.eval()


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


def _refuse_small_device(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    available = available_bytes(device)
    needed = sum(row.size for row in parameters(config)) * dtype.itemsize
    if available is not None and needed > available:
        raise CapacityError(
            f"the model needs {needed / 2**30:.1f} GiB in {dtype}; {device} has {available / 2**30:.1f} GiB available",
            hint="load it in torch.bfloat16 where that is smaller, or choose a smaller model",
        )

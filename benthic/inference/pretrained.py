"""`benthic.load_model` and `benthic.save_model`: a published folder as a model, and back."""

from __future__ import annotations

from pathlib import Path

import torch

from benthic.checkpoint import WeightFormat, load_into, open_checkpoint, write_checkpoint
from benthic.model import LanguageModel


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """The model of a published folder, in eval mode; `dtype` defaults to the one that its config.json states.

    Takes one file or shards, fp32, bf16, fp16 or FP8 (dequantised), with or without prediction layers. Routing biases
    stay float32. Raises ConfigError or CheckpointError, before any memory is taken, naming every fault of the folder.
    """
    checkpoint = open_checkpoint(folder)
    dtype = dtype or getattr(torch, checkpoint.config.dtype)
    model = LanguageModel(checkpoint.config, device=device, dtype=dtype)
    load_into(model, checkpoint)
    return model.eval()


def save_model(
    model: LanguageModel,
    folder: str | Path,
    weights: WeightFormat = "bf16",
    *,
    max_shard_bytes: int = 5 * 10**9,
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

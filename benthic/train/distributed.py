"""What a run on several ranks does beside training: one folder for all, a device each, batches that divide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benthic.config.train import TrainConfig
from benthic.errors import BenthicError, ConfigError, RunError
from benthic.parallel.world import World
from benthic.train.folder import RunFolder


def own_device(kind: str) -> torch.device:
    """The device of this process: GPUs of a host go to its processes in order (torchrun's LOCAL_RANK)."""
    if kind != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(kind)
    index, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= there:
        raise ConfigError(
            f"process {index} of this host has no GPU of its own: torch sees {there}",
            hint=f"torchrun --nproc-per-node {there}, or --device cpu",
        )
    return torch.device("cuda", index)


def check_batches(config: TrainConfig) -> None:
    """Raise ConfigError unless every rank gets whole micro-batches of the largest batch."""
    micro, length = config.batch.micro_sequences, config.data.sequence_length
    config.parallel.check_batch(int(config.batch.sequences.peak), micro, length)


@contextmanager
def entered(path: Path, config: TrainConfig, resume: bool, world: World) -> Iterator[RunFolder]:
    """The run folder, which rank 0 makes and holds for all; errors as `RunFolder.open`'s, on every rank."""
    if not world.leads:
        if world.agree(False):
            raise RunError(f"rank 0 could not use the run folder {path}", hint="its message says why")
        yield RunFolder(path)
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(RunFolder.open(path, config, resume))
        except BenthicError:
            world.agree(True)
            raise
        world.agree(False)
        yield folder

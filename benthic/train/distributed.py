"""What a run on several ranks does beside training: a part of the model each, one folder for all, a device each,
batches that divide."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benthic.config.manifest import parameters
from benthic.config.train import TrainConfig
from benthic.errors import BenthicError, ConfigError, PeerError, RunError
from benthic.model.language_model import LanguageModel
from benthic.parallel.mesh import Seat
from benthic.parallel.placement import spread
from benthic.parallel.tensor import tensor_axis
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


def processes_here() -> int:
    """Ranks of the run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_batches(config: TrainConfig) -> None:
    """Raise ConfigError unless every rank gets whole micro-batches of the largest batch, and of a sequence that it
    shares more positions than prediction layers look ahead."""
    sequences, micro = int(config.batch.sequences.peak), config.batch.micro_sequences
    try:
        config.parallel.check_batch(sequences, micro, config.data.sequence_length)
    except ConfigError as error:
        fits = math.gcd(sequences // config.parallel.data, micro)
        smaller = f"; or --batch.micro_sequences {fits}" if sequences % config.parallel.data == 0 else ""
        raise ConfigError(error.message, f"{error.hint or ''}{smaller}") from None
    share = Seat(config.parallel, 0).share(config.data.sequence_length)
    depths = config.model.num_nextn_predict_layers
    if share is not None and share.length // (share.context * share.tensor) <= depths:
        raise ConfigError(
            f"data.sequence_length is {share.length}, of which each of {share.context} context and {share.tensor} "
            f"tensor ranks has {share.length // (share.context * share.tensor)} positions; {depths} prediction layers "
            "need more"
        )


@contextmanager
def entered(path: Path, config: TrainConfig, resume: bool, world: World) -> Iterator[RunFolder]:
    """The run folder, which rank 0 makes and holds for all; errors as `RunFolder.open`'s, on every rank."""
    if not world.leads:
        if world.agree(False):
            raise PeerError(f"rank 0 could not use the run folder {path}")
        if not (path / "config.yaml").is_file():
            raise RunError(
                f"rank {world.rank} does not see the run folder that rank 0 made at {path}",
                hint="--run-folder must lie on a file system that all hosts see: each rank writes its part there",
            )
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


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What weights are used in; FP8 copies are made of bfloat16 ones."""
    return torch.float32 if config.precision.compute == "float32" else torch.bfloat16


def _require_pieces(config: TrainConfig, in_float8: Collection[str]) -> None:
    """Raise ConfigError where tensor ranks would be left with matrices that FP8 cannot multiply."""
    from benthic.model.float8 import WIDTH_UNIT

    ranks = config.parallel.tensor
    for row in parameters(config.model) if ranks > 1 else ():
        axis = tensor_axis(row)
        if row.name in in_float8 and axis is not None and row.shape[axis] // ranks % WIDTH_UNIT:
            raise ConfigError(
                f"parallel.tensor {ranks} leaves a rank {row.shape[axis] // ranks} of the {row.shape[axis]} "
                f"{'rows' if axis == 0 else 'columns'} of {row.name}; FP8 needs a multiple of {WIDTH_UNIT}",
                hint="choose a smaller parallel.tensor, or precision.compute bfloat16",
            )


def build_model(config: TrainConfig, world: World, device: torch.device) -> LanguageModel:
    """The model, allocated on `device`: whole where this process is alone, this rank's part otherwise."""
    alone, dtype = world.size == 1, compute_dtype(config)
    model = LanguageModel(config.model, device if alone else torch.device("meta"), dtype)
    in_float8: tuple[str, ...] = ()
    if config.precision.compute == "float8":
        from benthic.model.float8 import use_float8

        in_float8 = use_float8(model).quantised
        _require_pieces(config, in_float8)
    if alone:
        return model
    spread(model.float(), config.model, world, dtype, in_float8)
    if in_float8:
        from benthic.model.float8 import keep_no_copies

        keep_no_copies(model)
    return model.to_empty(device=device)

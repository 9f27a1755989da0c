"""What a run on several ranks does beside training: a part of the model each, one folder for all, a device each,
batches that divide."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.config.manifest import parameters
from benthic.config.train import TrainConfig
from benthic.errors import BenthicError, ConfigError, PeerError, RunError
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import spread
from benthic.parallel.tensor import tensor_axis
from benthic.parallel.world import World
from benthic.plan.devices import find_device
from benthic.train.fit import plan_run
from benthic.train.folder import RunFolder
from benthic.train.schedule import smallest

if TYPE_CHECKING:  # torch's pipelining takes a while to import
    from benthic.train.pipeline import Pipeline, Section


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


def sequences_at_a_time(config: TrainConfig) -> int:
    """What a batch is a multiple of: micro-batches that all ranks, and a pipeline's schedule, come out even with."""
    layout = config.parallel
    return config.batch.micro_sequences * layout.data * layout.micro_batch_unit


def check_batches(config: TrainConfig) -> None:
    """Raise ConfigError unless every rank gets whole micro-batches of the largest batch, the smallest one fills a
    pipeline, and ranks that share a sequence have more of its positions than prediction layers look ahead."""
    batch, layout = config.batch, config.parallel
    unit, micro = sequences_at_a_time(config), batch.micro_sequences
    sequences, least = int(batch.sequences.peak), max(1, int(smallest(batch.sequences)) // unit) * unit
    try:
        layout.check_batch(sequences, micro, config.data.sequence_length)
    except ConfigError as error:
        fits = math.gcd(sequences // layout.data, micro)
        smaller = f"; or --batch.micro_sequences {fits}" if sequences % layout.data == 0 and fits < micro else ""
        raise ConfigError(error.message, f"{error.hint or ''}{smaller}") from None
    if least < sequences:
        layout.check_batch(least, micro, config.data.sequence_length)
    positions = config.data.sequence_length // (layout.context * layout.tensor)
    if layout.context * layout.tensor > 1 and positions <= config.model.num_nextn_predict_layers:
        raise ConfigError(
            f"data.sequence_length is {config.data.sequence_length}, of which each of {layout.context} context and "
            f"{layout.tensor} tensor ranks has {positions} positions; {config.model.num_nextn_predict_layers} "
            "prediction layers need more"
        )


def check_pipeline(config: TrainConfig) -> None:
    """Raise ConfigError for settings that a pipeline's ranks cannot do."""
    layout = config.parallel
    if layout.pipeline > 1 and config.sampling.prompts:
        raise ConfigError(
            f"parallel.pipeline is {layout.pipeline}, and sampling.prompts asks for completions during the run: no "
            "rank of a pipeline has the whole model",
            hint="leave sampling.prompts empty; benthic generate completes text with the finished model",
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


def stage_layers(config: TrainConfig) -> tuple[range, ...]:
    """The layers of each stage of a pipeline, none without one: the planner's cut, which evens out what it counts for
    layers, embedding and head on such a device."""
    if config.parallel.pipeline == 1:
        return ()
    on_processor = config.device == "cpu" and config.precision.compute != "float8"  # which a GPU alone multiplies in
    return plan_run(config, find_device("cpu" if on_processor else "h200")).step.stages


def build_model(config: TrainConfig, world: World, device: torch.device) -> tuple[LanguageModel, Pipeline | None]:
    """The model, allocated on `device`: whole where this process is alone, this rank's part otherwise; and the pipeline
    that its stages are in, where there is one."""
    dtype = compute_dtype(config)
    if world.size == 1:
        model = LanguageModel(config.model, device, dtype)
        _in_float8(model, config)
        return model, None
    model, sections, _ = cut_model(config, world)
    model.to_empty(device=device)
    if not sections:
        return model, None
    from benthic.train.pipeline import Pipeline

    return model, Pipeline(config, sections, dtype, world)


def cut_model(config: TrainConfig, world: World) -> tuple[LanguageModel, dict[int, Section], tuple[str, ...]]:
    """This rank's part of the model on the meta device, the sections of a pipeline that it holds, and the names of the
    parameters that are multiplied in FP8."""
    dtype = compute_dtype(config)
    model = LanguageModel(config.model, torch.device("meta"), dtype)
    in_float8 = _in_float8(model, config)
    sections = laid_out(model, config, world, dtype, in_float8)
    if in_float8 and not sections:  # between the micro-batches of a pipeline weights stay gathered, copies as well
        from benthic.model.float8 import keep_no_copies

        keep_no_copies(model)
    return model, sections, in_float8


def _in_float8(model: LanguageModel, config: TrainConfig) -> tuple[str, ...]:
    """Make `model` compute in FP8 where the config says so; which parameters do."""
    if config.precision.compute != "float8":
        return ()
    from benthic.model.float8 import use_float8

    in_float8 = use_float8(model).quantised
    _require_pieces(config, in_float8)
    return in_float8


def laid_out(
    model: LanguageModel, config: TrainConfig, world: World, dtype: torch.dtype, in_float8: Collection[str] = ()
) -> dict[int, Section]:
    """Cut `model`, on the meta device, to this rank's part, in place; the sections of a pipeline that it holds."""
    own, sections = world.own_stages, {}
    if own:
        from benthic.train.pipeline import as_sections

        sections = dict(zip(own, as_sections(model, list(own.values()), config), strict=True))
    roots: dict[nn.Module, range] = {section: section.stage.layers for section in sections.values()}
    spread(model.float(), config.model, world, dtype, in_float8, roots)
    return sections

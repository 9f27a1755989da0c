"""Searching layouts: what fits, and of that the fewest GPUs, the shortest step or the cheapest token.

Also what the trainer asks before a run: does it fit this GPU, and if not, what would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Literal

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig, Schedule
from benthic.errors import CapacityError, ConfigError
from benthic.plan.devices import Device
from benthic.plan.flops import Recomputation
from benthic.plan.holdings import whole_model
from benthic.plan.layer_time import Overheads, Piece
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.training import Training
from benthic.plan.training_time import StepTime, all_pieces, assemble

Objective = Literal["fewest_gpus", "least_time", "least_cost"]
OBJECTIVES: tuple[Objective, ...] = ("fewest_gpus", "least_time", "least_cost")
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "up_projections", "layer")
MOST_GPUS = 4096
"""Where a search without a number of GPUs ends."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout that fits, and what it costs a step."""

    layout: ParallelConfig
    training: Training
    memory: TrainingMemory
    step: StepTime


def search(
    config: ModelConfig,
    training: Training,
    device: Device,
    sequences: int,
    gpus: int | None = None,
    objective: Objective = "least_time",
    recomputations: Sequence[Recomputation] = RECOMPUTATIONS,
) -> Choice:
    """The best layout for batches of `sequences`. With `gpus`, at most that many are used; without, up to MOST_GPUS.

    `training` gives sequence length, micro-batch and precision; of `recomputations` the first that fits is taken.
    Raises CapacityError, with the largest run that fits, where none does.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; allowed: {', '.join(OBJECTIVES)}")
    if gpus is not None and gpus < 1:
        raise ConfigError(f"gpus is {gpus}; it must be at least 1")
    found: list[Choice] = []

    def worth(step: StepTime) -> bool:
        return not found or _better(step, found[-1].step, objective)

    worlds = _worlds(gpus)
    # More GPUs never make a step longer, so the shortest is looked for from the top.
    for world in reversed(worlds) if objective == "least_time" else worlds:
        for choice in fitting(config, training, device, sequences, world, recomputations, worth):
            found.append(choice)
        if found and (objective != "least_cost" or found[-1].layout.world * 4 <= world):
            break
    if not found:
        limit = gpus or MOST_GPUS
        raise CapacityError(
            f"no layout of up to {limit} {device.title} fits sequences of {training.sequence_length} positions, "
            f"{training.micro_batch} at a time, in batches of {sequences}",
            _more_gpus(config, training, device, sequences, gpus, recomputations),
        )
    return found[-1]


def fitting(
    config: ModelConfig,
    training: Training,
    device: Device,
    sequences: int,
    world: int,
    recomputations: Sequence[Recomputation] = RECOMPUTATIONS,
    worth: Callable[[StepTime], bool] = lambda step: True,
) -> Iterator[Choice]:
    """Every layout of exactly `world` GPUs that divides model and batch and fits, with its least recomputation.

    Steps that are not `worth` it are passed over before their memory is played, which takes most of the time.
    """
    pieces: dict[tuple, list[list[Piece]]] = {}
    for layout in layouts(config, device, world):
        count = _micro_batches(config, layout, training, sequences)
        if not count or _least_bytes(config, layout, training) > device.memory_bytes:
            continue
        for recomputation in recomputations:
            tried = replace(training, micro_batches=count, recomputation=recomputation)
            key = (layout.tensor, layout.expert, recomputation, count)
            if key not in pieces:
                pieces[key] = all_pieces(config, tried, device, layout, Overheads())
            step = assemble(config, tried, device, layout, sequences, count, pieces[key], Overheads())
            if not worth(step):
                break
            memory = training_memory(config, tried, layout, step.stages, device)
            if memory.total <= device.memory_bytes:
                yield Choice(layout, tried, memory, step)
                break


def _least_bytes(config: ModelConfig, layout: ParallelConfig, training: Training) -> float:
    """A floor under the fullest rank's memory: the mean rank's weights, gradients, master weights and moments."""
    held = whole_model(config, layout)
    sharded = held.sharded(layout)
    resident = sharded if layout.zero >= 3 else held.elements
    gradients = sharded if layout.zero >= 2 else held.elements
    states = (4 if training.bf16_moments else 8) + (0 if training.precision == "fp32" else 4)
    copies = 2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1
    return copies / layout.pipeline * (resident + 4 * gradients + states * sharded)


def layouts(config: ModelConfig, device: Device, world: int) -> Iterator[ParallelConfig]:
    """Layouts of `world` GPUs worth trying: tensor parallelism inside a node, pipelines of powers of two, experts over
    as many ranks as divide both; FSDP without a pipeline, ZeRO-1 with one."""
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    for tensor in _powers(min(world, device.devices_per_node)):
        if world % tensor or config.num_attention_heads % tensor or config.num_key_value_heads % tensor:
            continue
        for pipeline in _powers(min(world // tensor, blocks)):
            if (world // tensor) % pipeline:
                continue
            shard = world // tensor // pipeline
            for expert in _expert_sizes(config, shard * tensor):
                for schedule in _schedules(pipeline, blocks):
                    yield ParallelConfig(
                        shard=shard,
                        zero=3 if pipeline == 1 else 1,
                        expert=expert,
                        pipeline=pipeline,
                        schedule=schedule,
                        tensor=tensor,
                    )


def require_fit(
    config: ModelConfig,
    training: Training,
    device: Device,
    layout: ParallelConfig | None = None,
    recomputations: Sequence[Recomputation] = RECOMPUTATIONS,
) -> TrainingMemory:
    """The memory of a run that fits `device`; otherwise CapacityError with the largest setting that does.

    `recomputations` are those the trainer can do; fewer sequences at a time are tried with each, then shorter
    sequences, then fewer layers.
    """
    memory = training_memory(config, training, layout, device=device)
    if memory.total <= device.memory_bytes:
        return memory
    needed, there = _needed_and_there(memory.total, device.memory_bytes)
    raise CapacityError(
        f"training needs {needed} at its peak ({memory.moment}), but {device.title} has {there}",
        _largest_fit(config, training, device, layout, recomputations),
    )


def _needed_and_there(needed: float, there: float) -> tuple[str, str]:
    """Both in words, what is needed rounded up and what is there down, so that the larger one also reads larger."""
    unit, name = (2**20, "MiB") if there < 10 * 2**30 else (2**30, "GiB")
    more, less = ceil(needed / unit), floor(there / unit)
    return f"{more:,} {name}", f"{less:,} {name}"


def _largest_fit(
    config: ModelConfig,
    training: Training,
    device: Device,
    layout: ParallelConfig | None,
    recomputations: Sequence[Recomputation],
) -> str:
    def fits(changed: Training, model: ModelConfig = config) -> bool:
        return training_memory(model, changed, layout, device=device).total <= device.memory_bytes

    for recomputation in dict.fromkeys((training.recomputation, *recomputations)):
        tried = replace(training, recomputation=recomputation)
        most = _largest(1, training.micro_batch, lambda n, tried=tried: fits(replace(tried, micro_batch=n)))
        if most:
            return f"what fits: micro-batches of {most}, recomputation {recomputation!r}"
    piece = min(64, training.sequence_length)
    last = replace(training, micro_batch=1, recomputation=(training.recomputation, *recomputations)[-1])
    pieces = training.sequence_length // piece
    length = piece * _largest(1, pieces, lambda n: fits(replace(last, sequence_length=n * piece)))
    if length:
        return f"what fits: micro-batches of 1, sequences of {length}, recomputation {last.recomputation!r}"
    shortest = replace(last, sequence_length=piece)
    every = config.num_hidden_layers
    layers = _largest(1, every - 1, lambda n: fits(shortest, config.replace(num_hidden_layers=n)))
    if layers:
        return f"what fits: {layers} of {every} layers, or the same model over more GPUs"
    return "no number of layers fits; use more GPUs, or a smaller hidden_size or vocab_size"


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in low ... high that fits, when smaller ones always do; 0 if none does."""
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _more_gpus(
    config: ModelConfig,
    training: Training,
    device: Device,
    sequences: int,
    gpus: int | None,
    recomputations: Sequence[Recomputation],
) -> str:
    if gpus is not None and gpus < MOST_GPUS:
        for world in _worlds(MOST_GPUS):
            if world > gpus and any(True for _ in fitting(config, training, device, sequences, world, recomputations)):
                return f"{world} GPUs are the fewest that fit it"
    length = training.sequence_length // 2
    while length >= 64:
        shorter = replace(training, sequence_length=length, micro_batch=1)
        if any(True for _ in fitting(config, shorter, device, sequences, gpus or MOST_GPUS, recomputations)):
            return f"sequence_length {length} with micro_batch 1 fits"
        length //= 2
    return "use a larger device, a smaller model, or a batch that divides over more layouts"


def _better(step: StepTime, best: StepTime, objective: Objective) -> bool:
    if objective == "least_cost":
        return step.total * step.gpus < best.total * best.gpus
    return step.total < best.total


def _worlds(gpus: int | None) -> list[int]:
    worlds = list(_powers(gpus or MOST_GPUS))
    return worlds if gpus is None or gpus in worlds else [*worlds, gpus]


def _powers(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2


def _expert_sizes(config: ModelConfig, ranks: int) -> list[int]:
    if not config.n_routed_experts:
        return [1]
    return [size for size in _powers(ranks) if config.n_routed_experts % size == 0 and ranks % size == 0]


def _schedules(pipeline: int, blocks: int) -> tuple[Schedule, ...]:
    if pipeline == 1:
        return ("1f1b",)
    return ("1f1b", "zb1p", "dualpipev") if 2 * pipeline <= blocks else ("1f1b", "zb1p")


def _micro_batches(config: ModelConfig, layout: ParallelConfig, training: Training, sequences: int) -> int:
    """Micro-batches a rank, or 0 where model or batch do not divide. A pipeline needs as many as ranks to be one."""
    try:
        layout.check_model(config)
        count = layout.check_batch(sequences, training.micro_batch, training.sequence_length)
    except ConfigError:
        return 0
    return count if count >= layout.pipeline else 0

"""The layout a plan trains with: the one asked for, the best of a search, or quickly the best of a few.

A search (layout.py) tries every layout and takes seconds for a large model. Where neither a layout nor an objective is
asked for, a short list is tried: tensor parallelism over a whole node or none, pipelines whose halves feed each other
(DualPipeV), experts over as many ranks as divide them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import Device
from benthic.plan.layout import RECOMPUTATIONS, Choice, search
from benthic.plan.memory import training_memory
from benthic.plan.operations import Recomputation
from benthic.plan.parameters import count_parameters
from benthic.plan.request import PlanRequest
from benthic.plan.training import Training, TrainingPrecision
from benthic.plan.training_time import step_time

STEP_TOKENS = 2**22
"""Tokens of a step, about, where no batch is asked for."""
MICRO_BATCHES_A_RANK = 8
"""Micro-batches for each rank of a pipeline where no batch is asked for: a bubble of a tenth or so."""
LARGEST_WORLD = 8192
"""GPUs beyond which none are tried where none are asked for."""
LEAST_STATE_BYTES = 9
"""Of a parameter: FP8 weight, float32 master weight, two bf16 moments."""
PIPELINES = (4, 8, 16)


def choose_layout(config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision) -> Choice:
    """Layout, recomputation, memory and step. Only a layout or a number of GPUs that was asked for may not fit.

    Raises ConfigError where it does not divide model or batch, CapacityError where a search finds nothing that fits.
    """
    if request.layout is not None:
        layout = ParallelConfig.parse(request.layout)
        if request.gpus not in (None, layout.world):
            raise ConfigError(f"layout {request.layout!r} is for {layout.world:,} GPUs, but gpus is {request.gpus:,}")
        return _least_recomputation(config, request, device, precision, layout)
    if request.objective is not None:
        sequences = request.sequences or max(1, STEP_TOKENS // request.sequence_length)
        training = _training(request, precision, ParallelConfig(), "none")
        return search(config, training, device, sequences, request.gpus, request.objective, _recomputations(request))
    return _quick(config, request, device, precision)


def reasons(chosen: Choice, request: PlanRequest, device: Device) -> list[str]:
    """Why this layout and recomputation, in sentences."""
    fits = chosen.memory.total <= device.memory_bytes
    if request.layout is not None:
        why = "as asked"
    elif request.objective is not None:
        why = f"{request.objective} of all layouts"
    else:
        why = "the fastest of a few" if fits else "none that fits of a few"
        why += " layouts on these GPUs; --objective searches all"
    recomputation = "as asked" if request.recomputation else "the least that fits" if fits else "all there is"
    return [
        f"trained on {chosen.layout.world:,} GPUs laid out as {chosen.layout}: {why}",
        f"recomputation {chosen.training.recomputation}: {recomputation}",
    ]


def _quick(config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision) -> Choice:
    worlds = [request.gpus] if request.gpus else _worlds(config, device)
    for world in worlds:
        fitting = [
            _least_recomputation(config, request, device, precision, layout)
            for layout in _short_list(config, request, device, world)
            if _can_fit(config, request, device, precision, layout)
        ]
        if fitting:
            return max(fitting, key=lambda one: one.step.tokens_per_second_per_gpu)
    return _least_recomputation(config, request, device, precision, _sharded(config, worlds[-1]))


def _can_fit(
    config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision, layout: ParallelConfig
) -> bool:
    """Whether the most recomputation fits."""
    training = _training(request, precision, layout, _recomputations(request)[-1])
    return training_memory(config, training, layout, device=device).total <= device.memory_bytes


def _recomputations(request: PlanRequest) -> Sequence[Recomputation]:
    return [request.recomputation] if request.recomputation else RECOMPUTATIONS


def _worlds(config: ModelConfig, device: Device) -> list[int]:
    """Powers of two whose memory all together holds at least the states of training."""
    states = LEAST_STATE_BYTES * count_parameters(config).total
    worlds = [2**power for power in range(LARGEST_WORLD.bit_length())]
    return [world for world in worlds if world * device.memory_bytes >= states] or [LARGEST_WORLD]


def _short_list(config: ModelConfig, request: PlanRequest, device: Device, world: int) -> Iterator[ParallelConfig]:
    """Layouts of `world` GPUs that divide model and batch."""
    wanted = [_sharded(config, world)]
    for tensor in dict.fromkeys((1, device.devices_per_node)):
        wanted += [_piped(config, world, tensor, ranks) for ranks in PIPELINES if world % (tensor * ranks) == 0]
    for layout in wanted:
        try:
            layout.check_model(config)
            if request.sequences:
                layout.check_batch(request.sequences, request.micro_batch, request.sequence_length)
        except ConfigError:
            continue
        yield layout


def _sharded(config: ModelConfig, world: int) -> ParallelConfig:
    """Everything sharded (FSDP), experts over as many GPUs as divide them."""
    return ParallelConfig(shard=world, expert=_experts(config, world))


def _piped(config: ModelConfig, world: int, tensor: int, ranks: int) -> ParallelConfig:
    """A pipeline whose stages shard their optimiser states."""
    shard = world // (tensor * ranks)
    expert = _experts(config, shard * tensor)
    return ParallelConfig(shard=shard, zero=1, expert=expert, pipeline=ranks, schedule="dualpipev", tensor=tensor)


def _experts(config: ModelConfig, ranks: int) -> int:
    return math.gcd(ranks, config.n_routed_experts) if config.n_routed_experts else 1


def _least_recomputation(
    config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision, layout: ParallelConfig
) -> Choice:
    """The first recomputation that fits, or the last there is."""
    *fewer, last = _recomputations(request)
    for recomputation in fewer:
        training = _training(request, precision, layout, recomputation)
        if training_memory(config, training, layout, device=device).total <= device.memory_bytes:
            break
    else:
        training = _training(request, precision, layout, last)
    step = step_time(config, training, device, layout, layout.data * training.micro_batch * training.micro_batches)
    return Choice(layout, training, training_memory(config, training, layout, step.stages, device), step)


def _training(
    request: PlanRequest, precision: TrainingPrecision, layout: ParallelConfig, recomputation: Recomputation
) -> Training:
    if request.sequences and request.objective is None:
        count = layout.check_batch(request.sequences, request.micro_batch, request.sequence_length)
    else:
        share = layout.data * request.micro_batch * request.sequence_length
        fewest = MICRO_BATCHES_A_RANK * layout.pipeline if layout.pipeline > 1 else 1
        count = fewest * max(1, round(STEP_TOKENS / (share * fewest)))
    return Training(
        sequence_length=request.sequence_length,
        micro_batch=request.micro_batch,
        micro_batches=count,
        precision=precision,
        bf16_moments=precision == "fp8",
        recomputation=recomputation,
    )

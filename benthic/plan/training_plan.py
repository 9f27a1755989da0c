"""The training half of a plan: layout, memory of the fullest GPU, time of a step, cost of a run, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.breakdown import Breakdown
from benthic.plan.cost import Cost, training_cost
from benthic.plan.devices import Device, find_device
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.operations import RECOMPUTATIONS, Recomputation
from benthic.plan.parameters import count_parameters, stored_format
from benthic.plan.replay import Replay
from benthic.plan.request import PlanRequest
from benthic.plan.training import Training, TrainingPrecision
from benthic.plan.training_time import StepTime, step_time

MICRO_BATCHES_A_STAGE = 8
"""Micro-batches for each pipeline rank where no batch is asked for: a bubble of a tenth or so."""


LARGEST_WORLD = 8192
"""GPUs beyond which no layout is searched where none are asked for."""
LEAST_STATE_BYTES = 9
"""Of a parameter: FP8 weight, float32 master weight, two bf16 moments."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run as planned. `choices` say what was decided and why."""

    device: Device
    layout: ParallelConfig
    training: Training
    memory: TrainingMemory
    step: StepTime
    cost: Cost
    choices: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has room."""
        return self.memory.total <= self.device.memory_bytes

    @property
    def utilisation(self) -> float:
        """Model FLOPs over the device's dense bf16 peak (MFU): causal attention, MTP included."""
        return self.step.flops_per_second_per_gpu / self.device.peak["bf16"]


def plan_training(config: ModelConfig, request: PlanRequest) -> TrainingPlan:
    """Plan a run. Raises ConfigError where layout, batch and model do not divide."""
    device = find_device(request.device)
    precision, why = _precision(config, request, device)
    layout, training, choices = _layout(config, request, device, precision)
    sequences = layout.data * training.micro_batch * training.micro_batches
    step = step_time(config, training, device, layout, sequences)
    memory = training_memory(config, training, layout)
    cost = training_cost(step, request.tokens, device, request.dollars_per_hour)
    return TrainingPlan(device, layout, training, memory, step, cost, (why, *choices))


def _layout(
    config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision
) -> tuple[ParallelConfig, Training, list[str]]:
    """The layout asked for, or the fewest GPUs that hold the model, with the least recomputation that fits."""
    if request.layout is not None:
        layout = ParallelConfig.parse(request.layout)
        if request.gpus not in (None, layout.world):
            raise ConfigError(f"layout {request.layout!r} is for {layout.world:,} GPUs, but gpus is {request.gpus:,}")
        training, fits = _least_recomputation(config, request, device, precision, layout)
        return layout, training, [_said(training, request)]
    for world in [request.gpus] if request.gpus else _worlds(config, device):
        layout = _sharded(config, device, world)
        training, fits = _least_recomputation(config, request, device, precision, layout)
        if fits:
            break
    return layout, training, [f"trained on {layout.world:,} GPUs laid out as {layout}", _said(training, request)]


def _worlds(config: ModelConfig, device: Device) -> list[int]:
    """Powers of two whose memory all together holds at least the states of training."""
    states = LEAST_STATE_BYTES * count_parameters(config).total
    worlds = [2**power for power in range(LARGEST_WORLD.bit_length())]
    return [world for world in worlds if world * device.memory_bytes >= states] or [LARGEST_WORLD]


def _sharded(config: ModelConfig, device: Device, world: int) -> ParallelConfig:
    """Everything sharded (FSDP), experts over as many GPUs as divide them."""
    expert = math.gcd(world, config.n_routed_experts) if config.n_routed_experts else 1
    return ParallelConfig(shard=world, expert=expert)


def _least_recomputation(
    config: ModelConfig, request: PlanRequest, device: Device, precision: TrainingPrecision, layout: ParallelConfig
) -> tuple[Training, bool]:
    choices = [request.recomputation] if request.recomputation else list(RECOMPUTATIONS)
    training = _training(request, precision, layout, choices[-1])
    for recomputation in choices:
        training = _training(request, precision, layout, recomputation)
        if training_memory(config, training, layout).total <= device.memory_bytes:
            return training, True
    return training, False


def _training(
    request: PlanRequest, precision: TrainingPrecision, layout: ParallelConfig, recomputation: Recomputation
) -> Training:
    if request.sequences:
        count = layout.check_batch(request.sequences, request.micro_batch, request.sequence_length)
    else:
        count = MICRO_BATCHES_A_STAGE * layout.pipeline if layout.pipeline > 1 else 1
    return Training(
        sequence_length=request.sequence_length,
        micro_batch=request.micro_batch,
        micro_batches=count,
        precision=precision,
        bf16_moments=precision == "fp8",
        recomputation=recomputation,
    )


def _said(training: Training, request: PlanRequest) -> str:
    why = "as asked" if request.recomputation else "the least that fits, or all there is"
    return f"recomputation {training.recomputation}: {why}"


def _precision(config: ModelConfig, request: PlanRequest, device: Device) -> tuple[TrainingPrecision, str]:
    if request.precision:
        if request.precision not in device.peak:
            raise ConfigError(
                f"precision is {request.precision}, which {device.name} lacks",
                hint="allowed: " + ", ".join(device.peak),
            )
        return request.precision, f"training in {request.precision}, as asked"
    if stored_format(config) == "fp8" and "fp8" in device.peak:
        return "fp8", "training in fp8, as the published weights suggest"
    return "bf16", "training in bf16"


def describe(plan: TrainingPlan) -> dict[str, Any]:
    """A training plan as plain data."""
    step, training = plan.step, plan.training
    return {
        "device": plan.device.name,
        "gpus": plan.layout.world,
        "layout": str(plan.layout),
        "precision": training.precision,
        "recomputation": training.recomputation,
        "sequence_length": training.sequence_length,
        "micro_batch": training.micro_batch,
        "micro_batches": training.micro_batches,
        "sequences": step.tokens // training.sequence_length,
        "tokens_per_step": step.tokens,
        "fits": plan.fits,
        "fullest_rank": plan.memory.rank,
        "fullest_moment": plan.memory.moment,
        "step_seconds": step.total,
        "step_by_part": step.by_part,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "model_flops_utilisation": plan.utilisation,
        "gpu_hours_per_trillion_tokens": step.gpu_hours_per_trillion_tokens,
    }


def describe_cost(plan: TrainingPlan, tokens: float) -> dict[str, Any]:
    """The cost of a run as plain data."""
    cost = plan.cost
    return {
        "tokens": tokens,
        "gpu_hours": cost.gpu_hours,
        "dollars": cost.dollars,
        "days": cost.days,
        "dollars_per_hour": cost.dollars_per_hour,
        "assumptions": list(cost.assumptions),
    }


def describe_replay(run: Replay) -> dict[str, Any]:
    """The predicted run of DeepSeek-V3 as plain data."""
    main = run.main
    return {
        "comparisons": [asdict(one) | {"ratio": one.ratio} for one in run.comparisons],
        "pretraining": {
            "layout": str(main.layout),
            "memory_gigabytes_per_gpu": main.memory.total / 1e9,
            "step_seconds": main.step.total,
            "tokens_per_second_per_gpu": main.step.tokens_per_second_per_gpu,
            "bubble_share": main.step.share("bubble"),
            "exposed_communication_share": main.step.share("exposed communication"),
        },
        "effects": run.effects,
        "assumptions": list(run.assumptions),
    }


def explain(plan: TrainingPlan) -> dict[str, list[dict[str, Any]]]:
    """Addends of memory and of step time, each with its formula and numbers."""
    return {"memory": _terms(plan.memory), "step": _terms(plan.step)}


def _terms(found: Breakdown) -> list[dict[str, Any]]:
    return [
        {"part": one.part, "name": one.name, "formula": one.formula, "value": one.value, "unit": found.unit}
        for one in found.lines
    ]

"""The training half of a plan: layout, memory of the fullest GPU, time of a step, cost of a run, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.breakdown import Breakdown
from benthic.plan.cost import Cost, training_cost
from benthic.plan.devices import Device, find_device
from benthic.plan.layout import Choice
from benthic.plan.layout_choice import choose_layout, reasons
from benthic.plan.memory import TrainingMemory
from benthic.plan.parameters import stored_format
from benthic.plan.replay import Replay
from benthic.plan.request import PlanRequest
from benthic.plan.training import Training, TrainingPrecision
from benthic.plan.training_time import StepTime


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run as planned. `choices` say what was decided and why."""

    device: Device
    chosen: Choice
    cost: Cost
    choices: tuple[str, ...]

    @property
    def layout(self) -> ParallelConfig:
        """How the GPUs are used."""
        return self.chosen.layout

    @property
    def training(self) -> Training:
        """What a step keeps and computes."""
        return self.chosen.training

    @property
    def memory(self) -> TrainingMemory:
        """Of the fullest GPU."""
        return self.chosen.memory

    @property
    def step(self) -> StepTime:
        """Of the slowest rank."""
        return self.chosen.step

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has room."""
        return self.memory.total <= self.device.memory_bytes

    @property
    def utilisation(self) -> float:
        """Model FLOPs over the device's dense bf16 peak (MFU): causal attention, MTP included."""
        return self.step.flops_per_second_per_gpu / self.device.peak["bf16"]


@lru_cache(maxsize=16)
def plan_training(config: ModelConfig, request: PlanRequest) -> TrainingPlan:
    """Plan a run. Raises ConfigError where layout, batch and model do not divide."""
    device = find_device(request.device)
    precision, why = _precision(config, request, device)
    chosen = choose_layout(config, request, device, precision)
    cost = training_cost(chosen.step, request.tokens, device, request.dollars_per_hour)
    return TrainingPlan(device, chosen, cost, (why, *reasons(chosen, request, device)))


def _precision(config: ModelConfig, request: PlanRequest, device: Device) -> tuple[TrainingPrecision, str]:
    if request.precision:
        if request.precision not in device.peak:
            allowed = "allowed: " + ", ".join(device.peak)
            raise ConfigError(f"precision is {request.precision!r}, which {device.name} lacks", hint=allowed)
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
        "gpu_hours_by_part": cost.by_part,
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

"""What a run will take, from the planner's formulas: memory before anything is allocated, time, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benthic.config.train import TrainConfig
from benthic.errors import CapacityError
from benthic.plan.devices import Device, find_device
from benthic.plan.layout import require_fit
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.parameters import ParameterCount, count_parameters
from benthic.plan.training import Training, TrainingPrecision
from benthic.plan.training_time import StepTime, step_time
from benthic.train.schedule import planned_tokens

PRECISIONS: dict[str, TrainingPrecision] = {"float32": "fp32", "bfloat16": "bf16", "float8": "fp8"}
"""The planner's names of what a run computes in."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run as planned for `device`: its `tokens`, and of one update at the peak batch, `memory` and `step`."""

    device: Device
    parameters: ParameterCount
    tokens: int
    memory: TrainingMemory
    step: StepTime

    @property
    def hours(self) -> float:
        """Of updates alone: preparing text, validation and saving come on top."""
        return self.tokens / self.step.tokens * self.step.total / 3600

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.memory.total <= self.device.memory_bytes


def training_of(config: TrainConfig, compute: str) -> Training:
    """What the planner calls this run, computing in `compute` ("float32", "bfloat16" or "float8")."""
    micro, memory = config.batch.micro_sequences, config.memory
    return Training(
        sequence_length=config.data.sequence_length,
        micro_batch=micro,
        micro_batches=max(1, int(config.batch.sequences.peak) // (micro * config.parallel.data)),
        precision=PRECISIONS[compute],
        bf16_moments=config.precision.moments == "bfloat16",
        recomputation=memory.recomputation,
        averaged_weights=config.optimizer.ema_decay is not None
        and not (memory.offload_average or memory.offload_optimizer),
    )


def plan_run(config: TrainConfig, device: Device) -> RunPlan:
    """The plan of a run on one `device` a rank; "auto" precision is what the trainer would choose there."""
    compute = config.precision.compute
    if compute == "auto":
        compute = "float32" if device.name == "cpu" else "bfloat16"
    training = training_of(config, compute)
    return RunPlan(
        device=device,
        parameters=count_parameters(config.model),
        tokens=planned_tokens(config),
        memory=_on_device(training_memory(config.model, training, config.parallel, device=device), config),
        step=step_time(config.model, training, device, config.parallel),
    )


def require_room(config: TrainConfig, title: str, available_bytes: int) -> TrainingMemory:
    """The memory of a run, of its fullest rank, whose device, called `title`, has `available_bytes` left.

    `config` says what it computes in and on, "auto" no longer. Raises CapacityError with the largest setting that
    fits, in the run's words.
    """
    training, layout = training_of(config, config.precision.compute), config.parallel
    # Of a device, memory takes only what CUDA keeps for itself, the same on every GPU.
    like = find_device("cpu" if config.device == "cpu" else "h200")
    everything = training_memory(config.model, training, layout, device=like)
    elsewhere = everything.total - _on_device(everything, config).total
    device = replace(like, title=title, memory_bytes=int(available_bytes + elsewhere))
    try:
        memory = require_fit(config.model, training, device, layout, ("none", "up_projections", "layer"))
    except CapacityError as error:
        options = (
            "the options are --batch.micro_sequences, --memory.recomputation, --data.sequence_length and "
            "--model.num_hidden_layers"
        )
        raise CapacityError(error.message, f"{error.hint}; {options}") from None
    return _on_device(memory, config)


def _on_device(memory: TrainingMemory, config: TrainConfig) -> TrainingMemory:
    """`memory` without what the run keeps in the processor's."""
    if not config.memory.offload_optimizer:
        return memory
    return replace(memory, lines=tuple(line for line in memory.lines if line.name not in ("moments", "master weights")))


def compared(planned: TrainingMemory, measured_bytes: int) -> str:
    """The highest allocation of a GPU beside the planned one, in words."""
    gib = 2**30
    return (
        f"memory: {measured_bytes / gib:.2f} GiB allocated at the highest moment, {planned.allocated / gib:.2f} GiB "
        f"planned ({measured_bytes / planned.allocated - 1:+.1%})"
    )

"""What a run will take, from the planner's formulas: memory before anything is allocated, time, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benthic.config.train import TrainConfig
from benthic.errors import CapacityError
from benthic.plan.devices import Device, find_device
from benthic.plan.layout import require_fit
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.parameters import ParameterCount, count_parameters
from benthic.plan.training import Training
from benthic.plan.training_time import StepTime, step_time
from benthic.train.schedule import planned_tokens


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
    """What the planner calls this run, computing in `compute` ("float32" or "bfloat16")."""
    micro = config.batch.micro_sequences
    return Training(
        sequence_length=config.data.sequence_length,
        micro_batch=micro,
        micro_batches=max(1, int(config.batch.sequences.peak) // micro),
        precision="bf16" if compute == "bfloat16" else "fp32",
        averaged_weights=config.optimizer.ema_decay is not None,
    )


def plan_run(config: TrainConfig, device: Device) -> RunPlan:
    """The plan of a run on one `device`; "auto" precision is what the trainer would choose there."""
    compute = config.precision.compute
    if compute == "auto":
        compute = "float32" if device.name == "cpu" else "bfloat16"
    training = training_of(config, compute)
    return RunPlan(
        device=device,
        parameters=count_parameters(config.model),
        tokens=planned_tokens(config),
        memory=training_memory(config.model, training, device=device),
        step=step_time(config.model, training, device),
    )


def require_room(config: TrainConfig, title: str, available_bytes: int) -> TrainingMemory:
    """The memory of a run whose device, called `title`, has `available_bytes` left.

    `config` says what it computes in and on, "auto" no longer. Raises CapacityError with the largest setting that
    fits, in the run's words.
    """
    training = training_of(config, config.precision.compute)
    # Of a device, memory takes only what CUDA keeps for itself, the same on every GPU.
    like = find_device("cpu" if config.device == "cpu" else "h200")
    device = replace(like, title=title, memory_bytes=available_bytes)
    try:
        # The trainer keeps all activations, so recomputation is no way out.
        return require_fit(config.model, training, device, recomputations=("none",))
    except CapacityError as error:
        options = "the options are --batch.micro_sequences, --data.sequence_length and --model.num_hidden_layers"
        raise CapacityError(error.message, f"{error.hint}; {options}") from None

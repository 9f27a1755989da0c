"""What a run costs: GPU-hours and dollars from a step's pace."""

from __future__ import annotations

from dataclasses import dataclass

from benthic.errors import ConfigError
from benthic.plan.breakdown import Breakdown, Term
from benthic.plan.devices import Device
from benthic.plan.training_time import StepTime


@dataclass(frozen=True, slots=True)
class Cost(Breakdown):
    """GPU-hours of a run, by what the time goes to. `dollars_per_hour` is the price of one GPU."""

    gpus: int = 1
    dollars_per_hour: float = 0.0

    @property
    def gpu_hours(self) -> float:
        """All GPUs' hours."""
        return self.total

    @property
    def dollars(self) -> float:
        """Price of the GPU-hours."""
        return self.total * self.dollars_per_hour

    @property
    def days(self) -> float:
        """Wall-clock days."""
        return self.total / self.gpus / 24


def training_cost(step: StepTime, tokens: float, device: Device, dollars_per_hour: float | None = None) -> Cost:
    """The cost of `tokens` tokens at the pace of `step`. Raises ConfigError for a price or a run below zero."""
    if tokens <= 0:
        raise ConfigError(f"tokens is {tokens:g}; it must be above 0")
    if dollars_per_hour is not None and dollars_per_hour < 0:
        raise ConfigError(f"dollars_per_hour is {dollars_per_hour:g}; it must be at least 0")
    price = device.dollars_per_hour.value if dollars_per_hour is None else dollars_per_hour
    source = device.dollars_per_hour.source if dollars_per_hour is None else "as given"
    steps = tokens / step.tokens
    terms = [
        Term(part, part, f"{steps:,.0f} steps x {seconds:.4g} s x {step.gpus:,} GPUs / 3600", seconds * scale)
        for scale in [steps * step.gpus / 3600]
        for part, seconds in step.by_part.items()
    ]
    assumptions = (
        f"{price:.2f} dollars a GPU-hour ({source})",
        f"{tokens:.4g} tokens at {step.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, without failures or evaluation",
        *step.assumptions,
    )
    return Cost("GPU-hours", tuple(terms), assumptions, step.gpus, price)

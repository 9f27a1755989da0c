"""Time of operations on a device: the longer of computing and moving bytes, each at the device's own rate.

A floor, not a forecast: launches, waves and synchronisation are left out, and operations follow one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benthic.plan.devices import Device, Rate
from benthic.plan.operations import Operation


@dataclass(frozen=True, slots=True)
class TimedOperation:
    """An operation with its time on a device, all executions together, and what bounds it."""

    operation: Operation
    compute_seconds: float
    memory_seconds: float
    rate: Rate | None

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of the two that is."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


def time_operation(operation: Operation, device: Device) -> TimedOperation:
    """The time of one operation. Raises ConfigError when the device lacks its precision."""
    memory = operation.total_bytes / device.memory_bandwidth.value
    if operation.work == "memory":
        return TimedOperation(operation, 0.0, memory, None)
    rate = device.rate(operation.work, operation.precision)
    return TimedOperation(operation, operation.total_flops / rate.value, memory, rate)


def roofline(operations: Iterable[Operation], device: Device) -> list[TimedOperation]:
    """Each operation's time, in the order given."""
    return [time_operation(one, device) for one in operations]


def total_seconds(timed: Sequence[TimedOperation]) -> float:
    """Time of operations that follow one another."""
    return sum(one.seconds for one in timed)

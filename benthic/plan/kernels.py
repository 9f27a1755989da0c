"""Memory-bound kernels: what they move, of which kind they are, how many are launched, and the time that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from benthic.plan.devices import Device, MemoryWork
from benthic.plan.training import TrainingPrecision

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels of one operation in one phase: bytes of an item (a token, or an element of a weight), all of them
    together. `kind` chooses the bandwidth. `role` as in activations.py: what recomputation repeats. `routed` marks
    rows that uneven experts make more of."""

    block: str
    name: str
    phase: Phase
    kind: MemoryWork
    bytes: float
    launches: int = 1
    role: str = "other"
    routed: bool = False


def both_ways(
    block: str, name: str, forward: float, backward: float, role: str = "other", routed: bool = False
) -> Iterator[Kernels]:
    """An operation whose passes are one copy-like kernel each."""
    yield Kernels(block, name, "forward", "elementwise", forward, role=role, routed=routed)
    yield Kernels(block, name, "backward", "elementwise", backward, role=role, routed=routed)


def moving_seconds(
    kernels: Iterable[Kernels], items: float, device: Device, precision: TrainingPrecision, imbalance: float = 0.0
) -> dict[str, float]:
    """Time of kernels one after another over `items`, by what they are called in a step: their bytes at the bandwidth
    of their kind, and no less than launching them takes. Fused kernels (fp8) are taken to move bytes as a copy does,
    launched ahead of time."""
    seconds: dict[str, float] = {}
    for one in kernels:
        moved = items * one.bytes * (1 + imbalance if one.routed else 1)
        if precision == "fp8":
            name, taken = "memory-bound", moved / device.memory_bandwidth.value
        else:
            launching = one.launches * device.launch_seconds.value
            name, taken = f"memory-bound, {one.kind}", max(moved / device.bandwidth(one.kind).value, launching)
        seconds[name] = seconds.get(name, 0.0) + taken
    return seconds

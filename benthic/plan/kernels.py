"""Memory-bound kernels: what they move, of which kind they are, how many are launched, and the time that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from benthic.plan.devices import Device, MemoryWork

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
    block: str, name: str, kind: MemoryWork, forward: float, backward: float, role: str = "other", routed: bool = False
) -> Iterator[Kernels]:
    """An operation whose passes are one kernel each."""
    yield Kernels(block, name, "forward", kind, forward, role=role, routed=routed)
    yield Kernels(block, name, "backward", kind, backward, role=role, routed=routed)


def moving_seconds(
    kernels: Iterable[Kernels], items: float, device: Device, imbalance: float = 0.0
) -> dict[str, float]:
    """Time of kernels one after another over `items`, by what they are called in a step: their bytes at the bandwidth
    of their kind, and no less than launching them takes."""
    seconds: dict[str, float] = {}
    for one in kernels:
        moved = items * one.bytes * (1 + imbalance if one.routed else 1)
        launching = one.launches * device.launch_seconds.value
        taken = max(moved / device.bandwidth(one.kind).value, launching)
        name = f"memory-bound, {one.kind}"
        seconds[name] = seconds.get(name, 0.0) + taken
    return seconds

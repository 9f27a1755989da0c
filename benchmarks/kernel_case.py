"""One thing to measure on the GPU: the work, its peers, what checks it, and what it costs at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """An operation at one shape, done by several implementations on the same inputs.

    `runs`: what is timed, by name, "benthic" first and then its peers ("benthic, ..." are variants of ours and no
    peers); each allocates or reuses its own outputs and returns what `check` can read. A gradient's run makes the
    backward pass alone (`torch.autograd.grad(..., retain_graph=True)`).
    `check(output)`: the relative error against the reference, |found - reference| / |reference| over all elements or
    over rows that say enough; a run above `tolerance` (or not a number) is never timed.
    `bytes`: what must move, each input read once and each output written once; nothing that a better kernel would not
    touch. `flops`: 2 a multiply-add, and of causal attention only the half that is not masked; 0 where memory is the
    limit. `unit`: whose matmul rate the FLOPs are held against.
    """

    operation: str
    shape: str
    runs: Mapping[str, Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    bytes: int
    flops: int = 0
    unit: Literal["bf16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        if next(iter(self.runs), None) != "benthic":
            raise ValueError(f"the first run of {self.operation} {self.shape} must be benthic, not {list(self.runs)}")

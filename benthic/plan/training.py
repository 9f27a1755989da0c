"""Training: what a training step keeps and computes, apart from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from benthic.errors import ConfigError
from benthic.plan.flops import Recomputation

TrainingPrecision = Literal["bf16", "fp8", "fp32"]
"""What matrices are multiplied in; fp8 is the trainer's float8, after DeepSeek-V3's recipe (report, section 3.3)."""
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
RECOMPUTATIONS: tuple[Recomputation, ...] = get_args(Recomputation)


@dataclass(frozen=True, slots=True)
class Training:
    """What training keeps and computes. `micro_batch` is in sequences; with `micro_batches` above 1 gradients
    accumulate. `expert_imbalance` is the fullest device's routed rows over the mean, minus 1."""

    sequence_length: int
    micro_batch: int = 1
    micro_batches: int = 1
    precision: TrainingPrecision = "bf16"
    bf16_moments: bool = False
    recomputation: Recomputation = "none"
    averaged_weights: bool = False
    expert_imbalance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, allowed in (("precision", TRAINING_PRECISIONS), ("recomputation", RECOMPUTATIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.expert_imbalance < 0:
            raise ConfigError(f"expert_imbalance is {self.expert_imbalance}; it must be at least 0")

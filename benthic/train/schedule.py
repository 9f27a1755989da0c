"""The value of a `Schedule` at a place in the run. Plain numbers, no state, so resuming needs none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benthic.config.train import Phase, Schedule, TrainConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is: `step` counts updates from 1 (the one being made), `tokens` those read before it."""

    step: int
    tokens: int
    steps: int

    def counted_in(self, unit: str) -> float:
        """The place in updates, in tokens, or as the share of all updates."""
        return {"steps": self.step, "tokens": self.tokens, "share": self.step / self.steps}[unit]


def value(schedule: Schedule, place: Place) -> float:
    """`schedule` at `place`: a linear warm-up of 2,000 steps makes update 1 with 1/2000 of the peak."""
    factor, begin = schedule.start, 0.0
    for phase in schedule.phases:
        here = place.counted_in(phase.unit)
        if here <= phase.until:
            return schedule.peak * _within(phase, factor, begin, here)
        factor, begin = phase.factor, phase.until
    return schedule.peak * factor


def _within(phase: Phase, before: float, begin: float, here: float) -> float:
    done = (here - begin) / (phase.until - begin)
    match phase.shape:
        case "constant":
            return phase.factor
        case "linear":
            return before + (phase.factor - before) * done
        case "cosine":
            return phase.factor + (before - phase.factor) * (1 + math.cos(math.pi * done)) / 2


def sequences_at(schedule: Schedule, micro_sequences: int, place: Place) -> int:
    """Sequences of the update at `place`: whole micro-batches, at least one (batch-size ramp)."""
    # A whole number that float64 misses by its last bit (49 * (2 / 49)) is not the one below.
    return max(1, int(value(schedule, place) * (1 + 1e-12)) // micro_sequences) * micro_sequences


def smallest(schedule: Schedule) -> float:
    """The least value of a run that lasts as long as its phases."""
    reached = [phase.factor for phase in schedule.phases]
    if not schedule.phases or schedule.phases[0].shape != "constant":
        reached.append(schedule.start)
    return schedule.peak * min(reached)


def planned_tokens(config: TrainConfig) -> int:
    """Tokens that all updates of a run read together."""
    tokens = 0
    for step in range(1, config.steps + 1):
        place = Place(step, tokens, config.steps)
        sequences = sequences_at(config.batch.sequences, config.batch.micro_sequences, place)
        tokens += sequences * config.data.sequence_length
    return tokens

"""Times of several subjects, taken in turn so that a busy moment hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

Subjects = dict[str, Callable[[], object]]


def seconds_in_turn(subjects: Subjects, repetitions: int, wait: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of every call, after one unmeasured call of each. `wait` returns when the device has finished."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for repetition in range(repetitions + 1):
        for name, call in subjects.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens a second of every subject: median, first and third quartile, best."""
    return {name: _one([tokens / one for one in seconds]) for name, seconds in times.items()}


def _one(speeds: list[float]) -> dict[str, float]:
    low, _, high = quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else (speeds[0],) * 3
    return {"median": median(speeds), "first_quartile": low, "third_quartile": high, "best": max(speeds)}


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """How many times as fast `ours` is, pair by pair of neighbouring calls."""
    return _one([b / a for a, b in zip(times[ours], times[theirs], strict=True)])

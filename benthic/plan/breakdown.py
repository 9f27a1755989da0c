"""Breakdown: a sum that can explain itself, line by line, each with its formula and the numbers in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One addend: `value` is what `formula` says, numbers in place. Terms of one `part` are added up in tables."""

    part: str
    name: str
    formula: str
    value: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Terms that add up to `total`, in `unit`; `assumptions` are the sentences the sum rests on."""

    unit: str
    lines: tuple[Term, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The sum of the lines."""
        return sum(line.value for line in self.lines)

    @property
    def by_part(self) -> dict[str, float]:
        """Sums of the lines by part, in order of appearance."""
        parts: dict[str, float] = {}
        for line in self.lines:
            parts[line.part] = parts.get(line.part, 0.0) + line.value
        return parts


def breakdown(unit: str, lines: Iterable[Term], assumptions: Iterable[str] = ()) -> Breakdown:
    """A Breakdown of the lines that are not zero."""
    return Breakdown(unit, tuple(line for line in lines if line.value), tuple(assumptions))

"""SplitMix64 (Steele, Lea and Flood 2014): small, and the same on every machine and in every version of everything.

`random` and numpy promise the streams of few of their methods; a corpus and an order of samples must not move under a
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """A bijection of 64-bit integers that looks random."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element; arithmetic on uint64 arrays wraps."""
    values = values + np.uint64(_GAMMA)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def key(*numbers: int) -> int:
    """One 64-bit key out of several numbers, their order included."""
    made = 0
    for number in numbers:
        made = mix(made ^ (number & _MASK))
    return made


class Draws:
    """A stream of draws decided by `numbers`."""

    def __init__(self, *numbers: int) -> None:
        self._state = key(*numbers)

    def below(self, limit: int) -> int:
        """Uniform in [0, limit); the bias of the multiplication is below limit / 2^64."""
        self._state = (self._state + _GAMMA) & _MASK
        return (mix(self._state) * limit) >> 64

    def between(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[Any]) -> Any:
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        """`items` in a uniform order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.below(1 << 53) < share * (1 << 53)

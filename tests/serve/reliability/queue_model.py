"""What a queue of so many places would do, had the server nothing else to do than answer.

Arrivals at random, answers of measured length, first come first served.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence


def simulated(
    seconds_each: Sequence[float], rate: float, slots: int, places: int, duration: float, chance: random.Random
) -> tuple[list[float], int]:
    """Seconds from arrival to end of those who were let in, and how many were not.

    `slots` are answered at once, each for as long as one drawn of `seconds_each`; `places` are in the system at most.
    """
    free = [0.0] * slots  # when each slot is free again
    ends: list[float] = []  # of all in the system
    taken, refused, now = [], 0, chance.expovariate(rate)
    while now < duration:
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        if len(ends) < places:
            end = max(now, heapq.heappop(free)) + chance.choice(seconds_each)
            heapq.heappush(free, end)
            heapq.heappush(ends, end)
            taken.append(end - now)
        else:
            refused += 1
        now += chance.expovariate(rate)
    return taken, refused

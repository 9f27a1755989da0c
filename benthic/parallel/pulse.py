"""Signs of life: each rank counts aloud in the store, so that one that is silent is told from one that is at work.

A collective waits alike for a rank that is slow, stopped, or on a host that has lost its network. Rank 0 names those
that have not been heard for a while, and says when they are back; what waits for them ends by its own timeout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist

from benthic.log import logger

EVERY = 1.0
"""Seconds between two counts of a rank."""
SILENCE = 30.0
"""Seconds after which a rank that has not counted on is reported."""


@contextmanager
def beating(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Inside, this rank gives signs of life, and rank 0 listens to all. `store` is left to a thread: no other may wait
    on the same connection meanwhile."""
    over = threading.Event()
    listener = Listener(size) if rank == 0 else None
    thread = threading.Thread(target=_beat, args=(store, rank, size, listener, over), name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(EVERY)


def _beat(store: dist.Store, rank: int, size: int, listener: Listener | None, over: threading.Event) -> None:
    count = 0
    try:
        while not over.is_set():
            count += 1
            store.set(_key(rank), str(count))
            if listener is not None:
                listener.hear(counts(store, range(size)), time.monotonic())
            over.wait(EVERY)
    except RuntimeError:
        return  # the store is gone, and torchrun with it: that is said where the run ends


def counts(store: dist.Store, ranks: range | list[int]) -> dict[int, int]:
    """How far each rank has counted, of those that have begun."""
    if not ranks:
        return {}
    keys = [_key(rank) for rank in ranks]
    if store.check(keys):
        return dict(zip(ranks, map(int, store.multi_get(keys)), strict=True))
    return {rank: int(store.get(key)) for rank, key in zip(ranks, keys, strict=True) if store.check([key])}


def _key(rank: int) -> str:
    return f"pulse/{rank}"


class Listener:
    """What rank 0 knows of the others: how far each had counted, and when that last changed."""

    def __init__(self, size: int) -> None:
        self._counts: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._silent: set[int] = set()
        self._size = size

    def hear(self, counted: Mapping[int, int], now: float) -> None:
        """Take in the counts of this moment, and report whose silence has become long or has ended."""
        for rank in range(self._size):
            last = self._heard.setdefault(rank, now)
            if rank in counted and counted[rank] != self._counts.get(rank):
                self._counts[rank], self._heard[rank] = counted[rank], now
                if rank in self._silent:
                    self._silent.remove(rank)
                    logger.warning("rank %d is back after %.0f s of silence", rank, now - last)
        new = [rank for rank, last in self._heard.items() if rank not in self._silent and now - last >= SILENCE]
        if new:
            self._silent.update(new)
            named = f"rank{'s' if len(new) > 1 else ''} {', '.join(map(str, new))}"
            logger.warning(
                "no sign of life of %s for %.0f s: stopped, starved of processor time, or cut off from the network; "
                "the others wait",
                named,
                SILENCE,
            )

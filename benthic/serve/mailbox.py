"""Mailbox: what the engine said about one HTTP request and its handler has not taken yet."""

from __future__ import annotations

import time
from asyncio import Event
from collections import deque
from collections.abc import AsyncIterator, Callable

from benthic.serve.messages import Delta
from benthic.serve.refusal import Refusal

PATIENCE = 2.0
"""Seconds that a reader may be busy with one delta, whatever waits: what comes in a burst is no fault of his, nor is a
busy machine (a quarter of a second cut off an honest client on two cores that ran the tests)."""


class Mailbox:
    """Deltas of `answers` answers, for one reader.

    A reader who is stuck, because his client does not read, may let `most_bytes` wait, or as much as he is stuck with;
    then no more is kept, and what waits is thrown away. `failure` is why no more comes; `on_failure` is called once.
    """

    def __init__(self, answers: int, most_bytes: int, on_failure: Callable[[], None] = lambda: None) -> None:
        self.missing, self._most, self._on_failure = answers, most_bytes, on_failure
        self.failure: Refusal | None = None
        self._deltas: deque[Delta] = deque()
        self._waiting = 0
        self._busy_with, self._busy_since = 0, float("inf")
        self._news = Event()

    def put(self, delta: Delta) -> None:
        """One more delta; nothing more is kept after a failure."""
        if self.failure is not None:
            return
        self._deltas.append(delta)
        self._waiting += delta.bytes_held
        self.missing -= delta.finish is not None
        if self._waiting > max(self._most, self._busy_with) and time.monotonic() - self._busy_since > PATIENCE:
            self.fail(Refusal(408, f"the client left more than {self._most} bytes unread", "timeout_error"))
        self._news.set()

    def fail(self, failure: Refusal) -> None:
        """No more comes."""
        if self.failure is None:
            self.failure = failure
            self._deltas.clear()
            self._on_failure()
        self._news.set()

    async def deltas(self) -> AsyncIterator[Delta]:
        """One after another as they come, until all answers ended. Raises the Refusal of a failure."""
        while self.missing or self._deltas or self.failure is not None:
            if self.failure is not None:
                raise self.failure
            if not self._deltas:
                self._news.clear()
                await self._news.wait()
                continue
            delta = self._deltas.popleft()
            self._busy_with, self._busy_since = delta.bytes_held, time.monotonic()
            self._waiting -= self._busy_with
            yield delta
            self._busy_with, self._busy_since = 0, float("inf")

"""Mailbox: what the engine said about one HTTP request and its handler has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from benthic.serve.messages import Delta
from benthic.serve.refusal import Refusal


class Mailbox:
    """Deltas of `answers` answers, for one reader.

    Holds at most `most_tokens` tokens: a reader that falls further behind is failed, and so its client disconnected.
    `failure` is why no more comes.
    """

    def __init__(self, answers: int, most_tokens: int) -> None:
        self.missing, self._most = answers, most_tokens
        self._deltas: list[Delta] = []
        self._tokens = 0
        self.failure: Refusal | None = None
        self._news = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """One more delta; nothing more is kept after a failure."""
        if self.failure is not None:
            return
        self._deltas.append(delta)
        self._tokens += len(delta.token_ids)
        self.missing -= delta.finish is not None
        if self._tokens > self._most:
            self.fail(Refusal(408, f"the client left more than {self._most} tokens unread", "timeout_error"))
        self._news.set()

    def fail(self, failure: Refusal) -> None:
        """No more comes."""
        self.failure = self.failure or failure
        self._news.set()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What came since, as it comes, until all answers ended. Raises the Refusal of a failure."""
        while self.missing or self._deltas:
            await self._news.wait()
            self._news.clear()
            if self.failure is not None:
                raise self.failure
            taken, self._deltas, self._tokens = self._deltas, [], 0
            if taken:
                yield taken

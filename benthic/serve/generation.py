"""Generation: the answers to one HTTP request, from the engine's acceptance to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from benthic.config.serve import Limits
from benthic.serve.engine_client import EngineClient
from benthic.serve.mailbox import Mailbox
from benthic.serve.messages import Delta, Sampling
from benthic.serve.metrics import Metrics
from benthic.serve.refusal import Refusal


class Generation:
    """`answers` in all, numbered in the order of the prompts."""

    def __init__(self, client: EngineClient, limits: Limits, metrics: Metrics, answers: int) -> None:
        self._client, self._limits, self._metrics = client, limits, metrics
        self._mailbox = Mailbox(answers, limits.unread_bytes, self._cancel)
        self._numbers: list[int] = []
        self._is_bound = False
        self._began = time.monotonic()
        self._clock: asyncio.TimerHandle | None = None
        self._last: dict[int, float] = {}

    async def begin(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], salt: str) -> None:
        """Hand the prompts to the engine. Raises Refusal; then the caller ends what had begun."""
        seconds = self._limits.request_seconds
        late = Refusal(504, f"the answer took longer than {seconds:g} s", "timeout_error", code="request_timeout")
        self._clock = asyncio.get_running_loop().call_later(seconds, self._mailbox.fail, late)
        self._is_bound = any(one.json_schema or one.regex or one.grammar for one in samplings)
        self._client.require(self._mailbox.missing)
        first, admitted = 0, []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            number, taken_in = self._client.submit(self._mailbox, prompt, sampling, salt, first)
            self._numbers.append(number)
            admitted.append(taken_in)
            first += sampling.n
        await asyncio.gather(*admitted)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is added to which answer. Raises Refusal where the engine fails, or one of the answers."""
        async for delta in self._mailbox.deltas():
            self._measure(delta, time.monotonic())
            if delta.finish is not None and delta.finish.reason not in ("stop", "length"):
                raise self._failed(delta.finish.error or "the answer failed")
            yield delta

    def end(self) -> None:
        """Give up what is still on its way."""
        if self._clock is not None:
            self._clock.cancel()
        if self._mailbox.failure is None:
            self._cancel()
        if self._numbers and self._mailbox.missing:
            failure = self._mailbox.failure
            is_ours = failure is not None and failure.status >= 500
            self._metrics.finished("error" if is_ours else "abort", self._mailbox.missing)

    def _cancel(self) -> None:
        for number in self._numbers:
            self._client.cancel(number)  # nothing happens for those that ended

    def _failed(self, why: str) -> Refusal:
        if self._is_bound:
            return Refusal(400, f"the answer could not follow its form: {why}", code="form_failed")
        return Refusal(500, why, "server_error", code="answer_failed")

    def _measure(self, delta: Delta, now: float) -> None:
        if delta.token_ids:
            if delta.index in self._last:
                self._metrics.between_tokens((now - self._last[delta.index]) / len(delta.token_ids))
            else:
                self._metrics.first_token(now - self._began)
            self._last[delta.index] = now
        if delta.finish is not None:
            self._metrics.finished(delta.finish.reason)
            self._metrics.answered(now - self._began)
            self._client.mean_seconds += 0.05 * (now - self._began - self._client.mean_seconds)

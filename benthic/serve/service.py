"""Service: what every endpoint works with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from benthic.config.serve import ServeConfig
from benthic.serve.body import parse, read_body, validated
from benthic.serve.engine_client import EngineClient
from benthic.serve.event_stream import while_connected
from benthic.serve.form_check import FormCheck
from benthic.serve.generation import Generation
from benthic.serve.messages import Ready, Sampling
from benthic.serve.metrics import Metrics
from benthic.serve.refusal import Refusal, unavailable, wrong
from benthic.text import Tokenizer

M = TypeVar("M", bound=BaseModel)


@dataclass(slots=True)
class Service:
    """One model behind one address."""

    config: ServeConfig
    client: EngineClient
    tokenizer: Tokenizer
    forms: FormCheck
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request is being answered."""
    _open: int = 0

    def __post_init__(self) -> None:
        self.quiet.set()

    def enter(self) -> None:
        """A request came."""
        self._open += 1
        self.quiet.clear()

    def leave(self) -> None:
        """Its response is sent, or nobody waits for it."""
        self._open -= 1
        if not self._open:
            self.quiet.set()

    async def read(self, request: Request, model: type[M]) -> M:
        """The request's body as a `model` for the model served here. Raises Refusal."""
        asked = validated(parse(await read_body(request, self.config.limits), self.config.limits), model)
        name = getattr(asked, "model", None)
        if name not in (None, self.config.model_name):
            raise Refusal(
                404,
                f"the model {name!r} is not here; this server has {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )
        request.scope["user"] = getattr(asked, "user", None) or "-"  # for the line of the log
        return asked

    def require(self, answers: int, prompts: int = 1) -> Ready:
        """The engine's sizes, where it takes `answers` more to each of `prompts` now.

        Raises Refusal 400 for more than a request may ask for, 503 and 429.
        """
        limits = self.config.limits
        if answers > limits.answers:
            raise wrong(f"n is {answers}; at most {limits.answers} are allowed", "n", "invalid_value")
        if not 1 <= prompts * answers <= limits.prompts:
            raise wrong(
                f"{prompts} prompts of {answers} answers are given; 1 to {limits.prompts} in all are allowed",
                "prompt",
                "invalid_value",
            )
        if self.draining:
            raise unavailable("the server is about to stop", "draining")
        return self.client.require(prompts * answers)

    async def begin(
        self, request: Request, prompts: Sequence[list[int]], samplings: Sequence[Sampling], salt: str
    ) -> Generation:
        """The answers to `prompts`, which the engine took in; the caller ends it.

        Raises Refusal, and ClientDisconnect where the client leaves meanwhile.
        """
        generation = Generation(self.client, self.config.limits, self.metrics, sum(one.n for one in samplings))
        try:
            await while_connected(request, generation.begin(prompts, samplings, salt))
        except BaseException:
            generation.end()
            raise
        return generation


def salt_of(request: Request, given: str | None) -> str:
    """Who shares cached blocks: requests of one key, and of one cache_salt among those."""
    return f"{request.scope['salt']}:{given or ''}"

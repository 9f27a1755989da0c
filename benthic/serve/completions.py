"""POST /v1/completions: prompts as they are, without a conversation around them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from benthic.errors import TextError
from benthic.serve.conversation import tokens_of
from benthic.serve.event_stream import EventStream, event, while_connected
from benthic.serve.generation import Generation
from benthic.serve.logprobs import TextLogprobs
from benthic.serve.messages import Delta
from benthic.serve.refusal import wrong
from benthic.serve.requests import CompletionRequest
from benthic.serve.sampling import check_stream, form_of, sampling_of
from benthic.serve.service import Service, salt_of
from benthic.serve.usage import Counter
from benthic.serve.wire import Choice, Completion, Logprobs, Usage, encode


async def completions(request: Request, service: Service) -> ASGIApp:
    """Answer, whole or in a stream."""
    asked = await service.read(request, CompletionRequest)
    _refuse_contradictions(asked)
    limits = service.config.limits
    form = form_of(asked, limits)
    sources = _separate(asked)
    ready = service.require(asked.n or 1, len(sources))
    prompts = [await _tokens(source, asked, service, ready.vocabulary) for source in sources]
    samplings = [sampling_of(asked, len(prompt), ready, limits, form) for prompt in prompts]
    if form is not None:
        await while_connected(request, service.forms.check(form))
    generation = await service.begin(request, prompts, samplings, salt_of(request, asked.cache_salt))
    job = _Job(asked, service, prompts)
    if asked.stream:
        return EventStream(job.events(generation), generation.end, limits)
    try:
        return Response(encode(await while_connected(request, job.whole(generation))), media_type="application/json")
    finally:
        generation.end()


def _separate(asked: CompletionRequest) -> list[str] | list[list[int]]:
    match asked.prompt:
        case str(text):
            return [text]
        case [int(), *_] as ids:
            return [ids]  # type: ignore[list-item]
    return asked.prompt  # type: ignore[return-value]


def _refuse_contradictions(asked: CompletionRequest) -> None:
    check_stream(asked)
    if asked.best_of not in (None, asked.n or 1):
        raise wrong("best_of is supported only where it equals n", "best_of", "unsupported_parameter")
    if asked.suffix is not None and (asked.echo or not isinstance(asked.prompt, str)):
        raise wrong("suffix goes with one prompt of text, and without echo", "suffix", "invalid_value")


async def _tokens(source: str | list[int], asked: CompletionRequest, service: Service, vocabulary: int) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(source, str):
        ids = await tokens_of(tokenizer, source, tokenizer.add_bos_token)
        if asked.suffix is not None:
            try:
                begin, hole, end = tokenizer.fim_ids
            except TextError as error:
                raise wrong(f"this model fills no gaps: {error.message}", "suffix", "unsupported_parameter") from None
            bos = ids[:1] if tokenizer.add_bos_token else []
            after = await tokens_of(tokenizer, asked.suffix, False)
            ids = [*bos, begin, *ids[len(bos) :], hole, *after, end]
    else:
        ids = source
        strange = next((token for token in ids if token >= vocabulary), None)
        if strange is not None:
            raise wrong(f"token id {strange} is not in the vocabulary of {vocabulary}", "prompt", "invalid_value")
    if not ids:
        raise wrong("a prompt is empty", "prompt", "invalid_value")
    return ids


class _Job:
    """What is told of the answers."""

    def __init__(self, asked: CompletionRequest, service: Service, prompts: Sequence[list[int]]) -> None:
        self._asked, self._service, self._prompts = asked, service, prompts
        self._answers_each = asked.n or 1
        self._created = int(time.time())
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._counter = Counter(sum(map(len, prompts)))
        self._logprobs: dict[int, TextLogprobs] = {}
        self._echoed: set[int] = set()
        options = asked.stream_options
        self._tells_usage = options is not None and options.include_usage

    async def whole(self, generation: Generation) -> Completion:
        """All answers, once they are complete."""
        count = len(self._prompts) * self._answers_each
        choices = [Choice(index, "") for index in range(count)]
        async for delta in generation.deltas():
            piece, choice = self._piece(delta), choices[delta.index]
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            choice.logprobs = choice.logprobs or piece.logprobs
            if choice.logprobs is not piece.logprobs:
                _join(choice.logprobs, piece.logprobs)
        return self._object(choices, self._counter.usage)

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The chunks of all answers, and last the usage."""
        usage = None if self._tells_usage else UNSET
        async for delta in generation.deltas():
            piece = self._piece(delta)
            if piece.text or piece.logprobs is not None or piece.finish_reason is not None:
                yield event(encode(self._object([piece], usage)))
        if self._tells_usage:
            yield event(encode(self._object([], self._counter.usage)))

    def _piece(self, delta: Delta) -> Choice:
        """What a delta adds; an echoed prompt comes with the first."""
        self._counter.add(delta)
        piece = Choice(delta.index, delta.text)
        logprobs = None
        if self._asked.logprobs is not None:
            first = TextLogprobs(self._asked.logprobs, self._service.tokenizer)
            logprobs = self._logprobs.setdefault(delta.index, first)
            piece.logprobs = Logprobs([], [], [], [])
        if self._asked.echo and delta.index not in self._echoed:
            self._echoed.add(delta.index)
            prompt = self._prompts[delta.index // self._answers_each]
            piece.text = self._service.tokenizer.decode(prompt, skip_special=True) + piece.text
            if logprobs is not None and delta.prompt_logprobs is not None:
                _join(piece.logprobs, logprobs.of_prompt(prompt, delta.prompt_logprobs))
        if logprobs is not None:
            _join(piece.logprobs, logprobs.of_delta(delta))
        if delta.finish is not None:
            piece.finish_reason = "length" if delta.finish.reason == "length" else "stop"
        return piece

    def _object(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._service.config.model_name,
            choices=choices,
            usage=usage,
        )


def _join(before: Logprobs | None, after: Logprobs | None) -> None:
    if before is not None and after is not None:
        for name in Logprobs.__struct_fields__:
            getattr(before, name).extend(getattr(after, name))

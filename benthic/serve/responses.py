"""POST /v1/responses: a conversation's next turn, as items. Nothing is kept: who goes on sends all items again."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp

from benthic.serve.answer_parts import END_OF_THOUGHT, AnswerParts
from benthic.serve.event_stream import EventStream, event, while_connected
from benthic.serve.generation import Generation
from benthic.serve.logprobs import chat_logprobs
from benthic.serve.messages import Delta
from benthic.serve.question import Begun, Question, begin
from benthic.serve.refusal import Refusal
from benthic.serve.response_input import choice_of_response, messages_of, tools_of
from benthic.serve.response_items import EndStatus, OutputItems
from benthic.serve.response_requests import ReasoningOptions, ResponsesRequest, TextFormat, TextOptions
from benthic.serve.response_wire import (
    Event,
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from benthic.serve.sampling import check_stream, form_of_text
from benthic.serve.service import Service
from benthic.serve.thinking import thinking_of
from benthic.serve.toolbox import toolbox_of
from benthic.serve.usage import Counter
from benthic.serve.wire import TokenLogprob, encode


async def responses(request: Request, service: Service) -> ASGIApp:
    """Answer, whole or in a stream."""
    asked = await service.read(request, ResponsesRequest)
    limits, tokenizer = service.config.limits, service.tokenizer
    check_stream(asked)
    text, reasoning = asked.text or TextOptions(), asked.reasoning or ReasoningOptions()
    question = Question(
        messages_of(asked),
        "input",
        toolbox_of(tools_of(asked.tools or ()), choice_of_response(asked), tokenizer, limits),
        form_of_text(text.format, limits),
        thinking_of(tokenizer, reasoning.effort, param="reasoning.effort"),
    )
    begun = await begin(request, service, asked, question)
    job = ResponseJob(asked, service, begun, question)
    if asked.stream:
        return EventStream(job.events(begun.generation), begun.generation.end, limits, done=b"")
    try:
        whole = await while_connected(request, job.whole(begun.generation))
        return HttpResponse(encode(whole), media_type="application/json")
    finally:
        begun.generation.end()


async def kept_response(request: Request, service: Service) -> HttpResponse:
    """What another server would have kept."""
    raise Refusal(
        404,
        f"there is no response {request.path_params['id'][:100]!r}: this server keeps none; "
        "send the conversation's items again as input",
        param="response_id",
        code="response_not_found",
    )


class ResponseJob:
    """What is told of one response."""

    def __init__(self, asked: ResponsesRequest, service: Service, begun: Begun, question: Question) -> None:
        self._service, self._asked = service, asked
        self._wanted = begun.sampling.logprobs
        self._counter = Counter(len(begun.prompt))
        self._parts = AnswerParts(service.tokenizer, begun.prompt, question.toolbox.format)
        self._items = OutputItems()
        self._response = _new_response(asked, service.config.model_name)
        self._events = 0
        self._thought = ""

    async def whole(self, generation: Generation) -> Response:
        """The response, once it is complete."""
        async for delta in generation.deltas():
            for _ in self._take(delta):
                pass
        return self._response

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """How the response comes about; a failure on the way is its last event."""
        for name in ("created", "in_progress"):
            yield self._encoded(self._told(name))
        try:
            async for delta in generation.deltas():
                for one in self._take(delta):
                    yield self._encoded(one)
        except Refusal as refusal:
            for one in self._items.close("incomplete"):
                yield self._encoded(one)
            self._end("failed")
            self._response.error = _error_of(refusal)
        yield self._encoded(self._told(self._response.status))

    def _take(self, delta: Delta) -> list[Event]:
        was_thinking = self._parts.is_reasoning
        self._counter.add(delta, was_thinking)
        parts = self._parts.add(delta.text)
        events = list(self._items.add(parts, self._logprobs(delta, was_thinking)))
        if delta.finish is None:
            return events
        status: EndStatus = "incomplete" if delta.finish.reason == "length" else "completed"
        events += self._items.add(self._parts.finish(), [])
        events += self._items.finish(status)
        self._end(status)
        return events

    def _end(self, status: Status) -> None:
        response = self._response
        response.status, response.output, response.usage = status, self._items.items, _usage(self._counter)
        if status == "completed":
            response.completed_at = int(time.time())
        elif status == "incomplete":
            response.incomplete_details = IncompleteDetails()

    def _logprobs(self, delta: Delta, was_thinking: bool) -> list[TokenLogprob]:
        """Of the tokens of content: those behind the end of a thought."""
        if self._wanted is None:
            return []
        found = chat_logprobs(delta, self._wanted, self._service.tokenizer).content if delta.token_ids else []
        if not was_thinking:
            return found
        for count, token in enumerate(delta.token_ids, 1):
            self._thought += self._service.tokenizer.decode([token])
            if END_OF_THOUGHT in self._thought:
                return found[count:]
            self._thought = self._thought[1 - len(END_OF_THOUGHT) :]
        return []

    def _told(self, what: str) -> Event:
        return ResponseEvent(type=f"response.{what}", response=self._response)

    def _encoded(self, one: Event) -> bytes:
        one.sequence_number, self._events = self._events, self._events + 1
        return event(encode(one), one.type)


def _new_response(asked: ResponsesRequest, model: str) -> Response:
    """A response that begins, with what was asked for or stands for it."""
    text, reasoning = asked.text or TextOptions(), asked.reasoning or ReasoningOptions()
    format_ = text.format or TextFormat(type="text")
    choice = asked.tool_choice or "auto"
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        model=model,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        prompt_cache_key=asked.prompt_cache_key,
        reasoning={"effort": reasoning.effort, "summary": reasoning.summary},
        safety_identifier=asked.safety_identifier,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        text={"format": format_.model_dump(by_alias=True, exclude_none=True)},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump() for tool in asked.tools or ()],
        top_logprobs=asked.top_logprobs or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        user=asked.user,
    )


def _usage(counter: Counter) -> ResponseUsage:
    given = counter.usage
    details = given.completion_tokens_details
    return ResponseUsage(
        given.prompt_tokens,
        InputDetails(given.prompt_tokens_details.cached_tokens),
        given.completion_tokens,
        OutputDetails(details.reasoning_tokens, details.accepted_prediction_tokens, details.rejected_prediction_tokens),
        given.total_tokens,
    )


def _error_of(refusal: Refusal) -> ResponseError:
    return ResponseError("invalid_prompt" if refusal.status == 400 else "server_error", refusal.message)

"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from benthic.serve.answer_parts import AnswerParts
from benthic.serve.event_stream import EventStream, event, while_connected
from benthic.serve.generation import Generation
from benthic.serve.logprobs import chat_logprobs
from benthic.serve.messages import Delta
from benthic.serve.parts import Arguments, Call, Content, Part, Reasoning
from benthic.serve.question import Question, begin
from benthic.serve.requests import ChatRequest
from benthic.serve.sampling import check_stream, form_of
from benthic.serve.service import Service
from benthic.serve.thinking import thinking_of
from benthic.serve.toolbox import choice_of, toolbox_of
from benthic.serve.usage import Counter
from benthic.serve.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    FunctionCall,
    Message,
    ToolCall,
    Usage,
    encode,
)
from benthic.text.tool_format import ToolFormat


async def chat(request: Request, service: Service) -> ASGIApp:
    """Answer, whole or in a stream."""
    asked = await service.read(request, ChatRequest)
    limits, tokenizer = service.config.limits, service.tokenizer
    check_stream(asked)
    toolbox = toolbox_of(asked.tools or (), choice_of(asked), tokenizer, limits)
    thinking = thinking_of(tokenizer, asked.reasoning_effort, asked.chat_template_kwargs)
    question = Question(asked.messages, "messages", toolbox, form_of(asked, limits), thinking)
    prompt, sampling, generation = await begin(request, service, asked, question, asked.n or 1)
    job = _Job(asked, service, prompt, sampling.n, toolbox.format)
    if asked.stream:
        return EventStream(job.events(generation), generation.end, limits)
    try:
        return Response(encode(await while_connected(request, job.whole(generation))), media_type="application/json")
    finally:
        generation.end()


class _Job:
    """What is told of the answers."""

    def __init__(
        self, asked: ChatRequest, service: Service, prompt: list[int], answers: int, tools: ToolFormat | None
    ) -> None:
        self._asked, self._service = asked, service
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._counter = Counter(len(prompt))
        self._parts = [AnswerParts(service.tokenizer, prompt, tools) for _ in range(answers)]
        options = asked.stream_options
        self._tells_usage = options is not None and options.include_usage

    async def whole(self, generation: Generation) -> ChatCompletion:
        """All answers, once they are complete."""
        answers = [_Whole(index) for index in range(len(self._parts))]
        async for delta in generation.deltas():
            answers[delta.index].add(self._take(delta), self._logprobs(delta), self._reason(delta))
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.config.model_name,
            choices=[answer.choice() for answer in answers],
            usage=self._counter.usage,
        )

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The chunks of all answers, and last the usage."""
        for index in range(len(self._parts)):
            yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        async for delta in generation.deltas():
            parts, logprobs, reason = self._take(delta), self._logprobs(delta), self._reason(delta)
            chunks = [ChatChunkChoice(delta.index, _delta_of(part)) for part in parts]
            if not chunks and (logprobs is not None or reason is not None):
                chunks = [ChatChunkChoice(delta.index, ChatDelta())]
            if chunks:
                chunks[0].logprobs, chunks[-1].finish_reason = logprobs, reason
            for chunk in chunks:
                yield self._chunk(chunk)
        if self._tells_usage:
            yield self._event([], self._counter.usage)

    def _take(self, delta: Delta) -> list[Part]:
        parts = self._parts[delta.index]
        self._counter.add(delta, parts.is_reasoning)
        found = parts.add(delta.text)
        return found if delta.finish is None else found + parts.finish()

    def _reason(self, delta: Delta) -> FinishReason | None:
        if delta.finish is None:
            return None
        if delta.finish.reason == "length":
            return "length"
        return "tool_calls" if self._parts[delta.index].calls else "stop"

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._asked.logprobs or not delta.token_ids:
            return None
        return chat_logprobs(delta, self._asked.top_logprobs or 0, self._service.tokenizer)

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        return self._event([choice], None if self._tells_usage else UNSET)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        name = self._service.config.model_name
        return event(encode(ChatChunk(id=self._id, created=self._created, model=name, choices=choices, usage=usage)))


class _Whole:
    """One answer put together."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._content: list[str] = []
        self._thought: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: ChatLogprobs | None = None
        self._reason: FinishReason = "stop"

    def add(self, parts: list[Part], logprobs: ChatLogprobs | None, reason: FinishReason | None) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._thought.append(text)
                case Call(_, id_, function):
                    self._calls.append(ToolCall(FunctionCall(function, ""), id=id_, type="function"))
                case Arguments(index, text):
                    call = self._calls[index].function
                    call.arguments = f"{call.arguments}{text}"
        if logprobs is not None:
            self._logprobs = self._logprobs or ChatLogprobs([])
            self._logprobs.content += logprobs.content
        self._reason = reason or self._reason

    def choice(self) -> ChatChoice:
        content = "".join(self._content)
        message = Message(content=None if self._calls and not content.strip() else content)
        if self._thought:
            message.reasoning_content = message.reasoning = "".join(self._thought)
        if self._calls:
            message.tool_calls = self._calls
        return ChatChoice(self._index, message, self._logprobs, self._reason)


def _delta_of(part: Part) -> ChatDelta:
    match part:
        case Content(text):
            return ChatDelta(content=text)
        case Reasoning(text):
            return ChatDelta(reasoning_content=text, reasoning=text)
        case Call(index, id_, function):
            return ChatDelta(tool_calls=[ToolCall(FunctionCall(function, ""), index, id_, "function")])
        case Arguments(index, text):
            return ChatDelta(tool_calls=[ToolCall(FunctionCall(None, text), index)])

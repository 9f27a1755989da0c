"""The objects of POST /v1/responses: the response, the items of its output, and the events of its stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from benthic.serve.wire import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """The text of a message. `logprobs` are empty unless they were asked for."""

    text: str = ""
    logprobs: list[TokenLogprob] = []
    annotations: list[None] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """The text of a thought."""

    text: str = ""


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    """What the model says to the user."""

    id: str
    status: ItemStatus = "in_progress"
    content: list[OutputText] = []
    role: Literal["assistant"] = "assistant"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    """What the model thought first. It comes in the open, and nothing sums it up."""

    id: str
    status: ItemStatus = "in_progress"
    content: list[ReasoningText] = []
    summary: list[None] = []
    encrypted_content: None = None


class CallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call of a function; `arguments` are JSON."""

    id: str
    call_id: str
    name: str
    status: ItemStatus = "in_progress"
    arguments: str = ""


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(msgspec.Struct):
    """`cached_tokens` were found in the cache; writing to it is not counted, as it costs a client nothing."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """Predictions are the drafts of speculative decoding."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ResponseUsage(msgspec.Struct):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    """Why a response ends early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(msgspec.Struct):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class Response(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/responses. What was asked for comes back in it; nothing is kept (`store`)."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool = False
    background: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class Event(msgspec.Struct, kw_only=True):
    """One event of a stream; its number is set when it is sent."""

    type: str
    sequence_number: int = -1


class ResponseEvent(Event, kw_only=True):
    """A response began, or ended: response.created, .in_progress, .completed, .incomplete, .failed."""

    response: Response


class ItemEvent(Event, kw_only=True):
    """An item began, or is whole."""

    output_index: int
    item: Item


class PartEvent(Event, kw_only=True):
    """The text of a message or a thought began, or is whole."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class TextDelta(Event, kw_only=True):
    """More text of a message."""

    type: str = "response.output_text.delta"
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(Event, kw_only=True):
    """All text of a message."""

    type: str = "response.output_text.done"
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(Event, kw_only=True):
    """More text of a thought."""

    type: str = "response.reasoning_text.delta"
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(Event, kw_only=True):
    """All text of a thought."""

    type: str = "response.reasoning_text.done"
    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class ArgumentsDelta(Event, kw_only=True):
    """More of a call's arguments."""

    type: str = "response.function_call_arguments.delta"
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, kw_only=True):
    """All of a call's arguments."""

    type: str = "response.function_call_arguments.done"
    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS = (
    ResponseEvent,
    ItemEvent,
    PartEvent,
    TextDelta,
    TextDone,
    ReasoningDelta,
    ReasoningDone,
    ArgumentsDelta,
    ArgumentsDone,
)
"""All kinds of events."""

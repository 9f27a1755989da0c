"""The objects of OpenAI's answers, as msgspec writes them: ten times as fast as pydantic, and a stream writes many."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]

encode = msgspec.json.Encoder().encode


class PromptDetails(msgspec.Struct):
    """`cached_tokens` of the prompt were found in the cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """Predictions are the drafts of speculative decoding."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct):
    """Of one HTTP request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(msgspec.Struct):
    """A token that could have come. `bytes` are the truth where a token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of the tokens of an answer or a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, omit_defaults=True):
    """`arguments` are JSON, or the next piece of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, omit_defaults=True):
    """A call, or in a stream a piece of the call number `index`: only the first has an id and a name."""

    function: FunctionCall
    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None


class Message(msgspec.Struct, kw_only=True):
    """An answer. The reasoning has two names, as clients read one or the other."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds; never reasoning and content at once."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(msgspec.Struct):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a stream. `usage` is there, null but in the last, where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Logprobs(msgspec.Struct):
    """Of plain completions: one entry a token; null for the first of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(msgspec.Struct):
    """One plain completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/completions, or a chunk of it: OpenAI's are of one shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    """The model served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "benthic"
    max_model_len: int | None = None


class Models(msgspec.Struct, kw_only=True):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(msgspec.Struct):
    """The answer of GET /health: ok, or why not."""

    status: Literal["ok", "loading", "silent", "restarting", "stopped", "draining"]
    engine_silence_seconds: float


class TokenIds(msgspec.Struct):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | msgspec.UnsetType = msgspec.UNSET


class Text(msgspec.Struct):
    """The answer of POST /detokenize."""

    prompt: str


class Error(msgspec.Struct):
    """What went wrong, and which parameter it was."""

    message: str
    type: str
    param: str | None
    code: str | None


class Errors(msgspec.Struct):
    """The body of every refusal: one error."""

    error: Error

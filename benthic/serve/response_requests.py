"""What a client may ask of POST /v1/responses. As in requests.py, a parameter typed None is known and not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from benthic.serve.requests import Asked, Drawing, Effort, Many, No, ShortText, Text

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Asked):
    """A part of a message. What only answers have is taken back as OpenAI's client gives it."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Many[Any] | None = None
    logprobs: Many[Any] | None = None


class InputMessage(Asked):
    """A message of the conversation, one of the model's own included."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[InputText]
    id: ShortText | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Asked):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: ShortText
    name: ShortText
    arguments: Text
    id: ShortText | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(Asked):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: Text | Many[InputText]
    id: ShortText | None = None
    status: ItemStatus | None = None


class ThoughtText(Asked):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: Text


class Thought(Asked):
    """What the model thought before it answered, or called. There is no summary of it here to take back."""

    type: Literal["reasoning"]
    content: Many[ThoughtText] | None = None
    summary: Many[Any] = Field([], max_length=0)
    encrypted_content: None = None
    id: ShortText | None = None
    status: ItemStatus | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return kind.upper() if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("MESSAGE")]
    | Annotated[FunctionCall, Tag("FUNCTION_CALL")]
    | Annotated[FunctionCallOutput, Tag("FUNCTION_CALL_OUTPUT")]
    | Annotated[Thought, Tag("REASONING")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="an item is an object of type message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(Asked):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Asked):
    """A function by name."""

    type: Literal["function"]
    name: ShortText


class AllowedFunctions(Asked):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[NamedFunction] = Field(min_length=1)


class TextFormat(Asked):
    """What the text must be. A schema binds it whether it says strict or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Asked):
    """Of the response's text."""

    format: TextFormat | None = None
    verbosity: None = None


class ReasoningOptions(Asked):
    """Of the thought. A summary is made where there is something that can make one, which is not here."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


class ResponseStreamOptions(Asked):
    """How a stream is written."""

    include_obfuscation: No | None = None


class ResponsesRequest(Drawing):
    """POST /v1/responses."""

    input: Text | Many[InputItem] = Field(min_length=1)
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    include: Many[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    store: No | None = None
    background: No | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    context_management: None = None
    moderation: None = None
    prompt_cache_retention: None = None
    prompt_cache_options: None = None

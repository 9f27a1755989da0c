"""What a client may ask, as pydantic models: strict types, and no field that is neither honoured nor refused.

Names are OpenAI's; top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, structured_outputs,
cache_salt and chat_template_kwargs are vLLM's. A parameter typed None is known and not supported: only null is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first fault is its only one: a body has room for a million, and each would take a kilobyte."""
Text = Annotated[str, Field(max_length=2**22)]
ShortText = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _refuse_yes(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


No = Annotated[bool, AfterValidator(_refuse_yes), WithJsonSchema({"const": False})]
"""Literal[False] would take 0 too."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Finite = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class Asked(BaseModel):
    """The base of all that comes from a client."""

    model_config = Finite


class StreamOptions(Asked):
    """How a stream tells about itself."""

    include_usage: bool = False
    include_obfuscation: No | None = None


class StructuredOutputs(Asked):
    """vLLM's way to bind an answer to a form: one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Text | None = None
    grammar: Text | None = None
    choice: Many[ShortText] | None = Field(None, min_length=1, max_length=1024)


class Drawing(Asked):
    """What all requests for text share: by which model, and how its tokens are drawn."""

    model: ShortText | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Many[str] | None = None
    stop_token_ids: Many[TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stream: bool | None = None
    cache_salt: ShortText | None = Field(None, min_length=1)
    user: ShortText | None = None


class Generation(Drawing):
    """What chat and plain completions share."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None


class TextPart(Asked):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(Asked):
    """The function of a call that an assistant made; `arguments` are JSON."""

    name: ShortText
    arguments: Text


class ToolCall(Asked):
    """A call that an assistant made."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Asked):
    """One message of a conversation. What only answers have is taken back as OpenAI's client gives it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Many[TextPart] | None = None
    name: ShortText | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: ShortText | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(Asked):
    """A function that a model may call; `parameters` are a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Asked):
    """A tool is a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Asked):
    """A function by name."""

    name: ShortText


class NamedTool(Asked):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedNames(Asked):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class AllowedTools(Asked):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames


class JsonSchema(Asked):
    """A schema with its name. It binds the answer whether it says strict or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TemplateArguments(Asked):
    """The variables of chat templates that a client may set."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: Effort | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Many[Literal["text"]] | None = None
    metadata: None = None
    prediction: None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(Generation):
    """POST /v1/completions. A prompt is text or token ids, one or several."""

    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    suffix: Text | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)


class TokenizeRequest(Asked):
    """POST /tokenize: a text, or a conversation as the model reads it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
                {"properties": {"messages": {"type": "array"}}, "required": ["messages"]},
            ]
        }
    )

    model: ShortText | None = None
    prompt: Text | None = None
    messages: Many[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Asked):
    """POST /detokenize."""

    model: ShortText | None = None
    tokens: Many[TokenId]

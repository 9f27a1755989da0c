"""A client's parameters become what the engine draws by; all that the models of requests.py cannot check is here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from benthic.config.serve import Limits
from benthic.serve.body import depth_of
from benthic.serve.messages import Ready, Sampling
from benthic.serve.refusal import Refusal, wrong
from benthic.serve.requests import (
    ChatRequest,
    CompletionRequest,
    Drawing,
    Generation,
    ResponseFormat,
    StructuredOutputs,
)
from benthic.serve.response_requests import ResponsesRequest, TextFormat

COMPLETION_TOKENS = 16
"""OpenAI's default of a plain completion."""
LOGPROBS = "message.output_text.logprobs"
_PROMPTS: dict[type[Drawing], str] = {ChatRequest: "messages", CompletionRequest: "prompt", ResponsesRequest: "input"}


@dataclass(frozen=True, slots=True)
class Form:
    """What binds an answer: its kind as SamplingParams names it, and the parameter that asked for it."""

    kind: str
    text: str
    param: str


def sampling_of(
    request: Drawing, prompt_tokens: int, ready: Ready, limits: Limits, form: Form | None = None
) -> Sampling:
    """How to answer a prompt of that many tokens. Raises Refusal 400 naming the parameter."""
    most = _max_tokens(request, prompt_tokens, ready)
    if (request.min_tokens or 0) > most:
        raise wrong(f"min_tokens is {request.min_tokens}; at most max_tokens ({most})", "min_tokens", "invalid_value")
    logprobs, prompt_logprobs = _logprobs(request)
    asked: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": max(request.top_k or 0, 0),
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": _logit_bias(request, ready, limits),
        "seed": None if request.seed is None else request.seed % 2**63,
        "stop": _stops(request, limits),
        "stop_token_ids": _stop_token_ids(request, ready),
        "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    if form is not None:
        asked[form.kind] = form.text
    answers = request.n or 1 if isinstance(request, Generation) else 1
    return Sampling(max_tokens=most, n=answers, **{name: value for name, value in asked.items() if value is not None})


def _max_tokens(request: Drawing, prompt_tokens: int, ready: Ready) -> int:
    name, asked = _token_limit(request)
    room = ready.longest - prompt_tokens
    if room < 1 or (asked or 1) > room:
        wanted = "" if asked is None else f", and {name} is {asked}"
        raise wrong(  # in OpenAI's words, by which clients tell this error from others
            f"This model's maximum context length is {ready.longest} tokens. However, the prompt has {prompt_tokens}"
            f"{wanted}.",
            _PROMPTS[type(request)],
            "context_length_exceeded",
        )
    return asked or (min(COMPLETION_TOKENS, room) if isinstance(request, CompletionRequest) else room)


def _token_limit(request: Drawing) -> tuple[str, int | None]:
    """The most tokens that the client wants, and the parameter that said so."""
    match request:
        case ResponsesRequest():
            return "max_output_tokens", request.max_output_tokens
        case ChatRequest(max_completion_tokens=int(most)):
            if request.max_tokens not in (None, most):
                raise wrong("max_tokens and max_completion_tokens differ; send one", "max_completion_tokens")
            return "max_completion_tokens", most
        case Generation():
            return "max_tokens", request.max_tokens
    raise AssertionError(f"{type(request).__name__} asks for no text")


def _logprobs(request: Drawing) -> tuple[int | None, int | None]:
    """How many alternatives are wanted to each token of the answer, and of the prompt; None where not even its own."""
    match request:
        case ResponsesRequest():
            wanted = request.top_logprobs or (0 if LOGPROBS in (request.include or ()) else None)
            return wanted, None
        case ChatRequest():
            if request.top_logprobs is not None and not request.logprobs:
                raise wrong("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
            return (request.top_logprobs or 0) if request.logprobs else None, None
    assert isinstance(request, CompletionRequest)
    return request.logprobs, request.logprobs if request.echo else None


def _logit_bias(request: Drawing, ready: Ready, limits: Limits) -> dict[int, float]:
    given = request.logit_bias or {}
    if len(given) > limits.bias_entries:
        raise wrong(f"logit_bias has {len(given)} entries; at most {limits.bias_entries} are allowed", "logit_bias")
    for name in given:
        if not re.fullmatch("[0-9]{1,9}", name) or int(name) >= ready.vocabulary:
            raise _no_token("logit_bias", repr(name[:50]), ready)
    return {int(name): bias for name, bias in given.items()}


def _stop_token_ids(request: Drawing, ready: Ready) -> tuple[int, ...]:
    given = request.stop_token_ids or []
    for token in given:
        if token >= ready.vocabulary:
            raise _no_token("stop_token_ids", str(token), ready)
    return tuple(given)


def _no_token(param: str, named: str, ready: Ready) -> Refusal:
    message = f"{param} names {named}; token ids of this model are 0 to {ready.vocabulary - 1}"
    return wrong(message, param, "invalid_value")


def _stops(request: Drawing, limits: Limits) -> tuple[str, ...]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > limits.stops:
        raise wrong(f"stop has {len(stops)} texts; at most {limits.stops} are allowed", "stop", "invalid_value")
    for stop in stops:
        if not 0 < len(stop.encode()) <= limits.stop_bytes:
            raise wrong(f"a stop text has 1 to {limits.stop_bytes} bytes", "stop", "invalid_value")
    return tuple(stops)


def check_stream(request: Generation | ResponsesRequest) -> None:
    """Raise Refusal 400 for stream_options without a stream."""
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options need stream to be true", "stream_options", "invalid_value")


def form_of(request: Generation, limits: Limits) -> Form | None:
    """What binds the answer. Raises Refusal 400 for more than one form, and for one beyond the limits."""
    format_ = request.response_format if isinstance(request, ChatRequest) else None
    forms = _formats(format_) + _structured(request.structured_outputs)
    if len(forms) > 1:
        raise wrong("the answer can be bound to one form only", forms[1].param, "invalid_value")
    return _bounded(forms[0], limits) if forms else None


def form_of_text(given: TextFormat | None, limits: Limits) -> Form | None:
    """What `text.format` of a response says. Raises Refusal 400."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Form("json_schema", '{"type": "object"}', "text.format")
    for name in ("name", "schema_"):
        if getattr(given, name) is None:
            param = f"text.format.{name.removesuffix('_')}"
            raise wrong(f"text.format of type json_schema needs {param}", param, "invalid_value")
    return _bounded(Form("json_schema", json.dumps(given.schema_), "text.format.schema"), limits)


def _bounded(form: Form, limits: Limits) -> Form:
    if len(form.text.encode()) > limits.schema_bytes:
        raise wrong(f"{form.param} has more than {limits.schema_bytes} bytes", form.param, "schema_too_large")
    if form.kind == "json_schema":
        refuse_large_schema(json.loads(form.text), form.param, limits)
    return form


def _formats(format_: ResponseFormat | None) -> list[Form]:
    match format_:
        case ResponseFormat(type="json_schema", json_schema=None):
            raise wrong("response_format of type json_schema needs json_schema", "response_format.json_schema")
        case ResponseFormat(type="json_schema", json_schema=given):
            assert given is not None
            if given.schema_ is None:
                raise wrong("json_schema needs schema", "response_format.json_schema.schema")
            return [
                Form("json_schema", _dumped(given.schema_, "response_format"), "response_format.json_schema.schema")
            ]
        case ResponseFormat(json_schema=given) if given is not None:
            raise wrong("json_schema goes with type json_schema", "response_format.json_schema")
        case ResponseFormat(type="json_object"):
            return [Form("json_schema", '{"type": "object"}', "response_format")]
    return []


def _structured(given: StructuredOutputs | None) -> list[Form]:
    if given is None:
        return []
    forms = []
    if given.json_ is not None:
        forms.append(Form("json_schema", _dumped(given.json_, "structured_outputs.json"), "structured_outputs.json"))
    if given.regex is not None:
        forms.append(Form("regex", given.regex, "structured_outputs.regex"))
    if given.grammar is not None:
        forms.append(Form("grammar", given.grammar, "structured_outputs.grammar"))
    if given.choice is not None:
        choices = " | ".join(json.dumps(one) for one in given.choice)
        forms.append(Form("grammar", f"start: {choices}", "structured_outputs.choice"))
    if not forms:
        raise wrong("structured_outputs has none of json, regex, grammar and choice", "structured_outputs")
    return forms


def _dumped(schema: dict[str, Any] | str, param: str) -> str:
    try:
        return json.dumps(json.loads(schema) if isinstance(schema, str) else schema, allow_nan=False)
    except (ValueError, RecursionError):
        raise wrong(f"{param} is not JSON", param, "invalid_value") from None


def refuse_large_schema(schema: Any, param: str, limits: Limits) -> None:
    """Raise Refusal 400 for a schema beyond the limits of depth and nodes."""
    if depth_of(schema, limits.schema_depth) > limits.schema_depth:
        raise wrong(f"{param} is nested more than {limits.schema_depth} deep", param, "schema_too_large")
    level, nodes = [schema], 0
    while level:
        nodes += len(level)
        if nodes > limits.schema_nodes:
            raise wrong(f"{param} has more than {limits.schema_nodes} nodes", param, "schema_too_large")
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]

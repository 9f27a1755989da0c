"""/openapi.json: made from the models that check requests and the structs that answers are written from, so it cannot
say anything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from benthic import __version__
from benthic.config.serve import ServeConfig
from benthic.serve.guard import OPEN_PATHS
from benthic.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from benthic.serve.response_requests import ResponsesRequest
from benthic.serve.response_wire import EVENTS, Response
from benthic.serve.wire import ChatChunk, ChatCompletion, Completion, Errors, Health, Model, Models, Text, TokenIds


class Body(NamedTuple):
    """What a POST takes and gives: an answer, or where the client asks for it a stream of `chunks`."""

    asked: type[BaseModel]
    answer: type[msgspec.Struct]
    chunks: tuple[type[msgspec.Struct], ...] = ()


BODIES: dict[str, Body] = {
    "/v1/chat/completions": Body(ChatRequest, ChatCompletion, (ChatChunk,)),
    "/v1/completions": Body(CompletionRequest, Completion, (Completion,)),
    "/v1/responses": Body(ResponsesRequest, Response, EVENTS),
    "/tokenize": Body(TokenizeRequest, TokenIds),
    "/detokenize": Body(DetokenizeRequest, Text),
}
PAGES: dict[str, type[msgspec.Struct] | str] = {
    "/v1/models": Models,
    "/v1/models/{name}": Model,
    "/health": Health,
    "/metrics": "text/plain; version=0.0.4",
    "/openapi.json": "application/json",
}
"""What a GET gives: JSON of a struct, or content of a type."""

_STATUSES = {
    "400": "the request is wrong",
    "404": "no such model",
    "408": "the body came too slowly",
    "413": "the body is too long",
    "415": "the body is not application/json",
    "429": "too many requests wait",
    "500": "the answer failed",
    "503": "the engine is not ready",
    "504": "the answer took too long",
}
_ANSWERS = "Answer.{name}"
"""Structs and models of requests have some names in common."""


def openapi(config: ServeConfig) -> dict[str, Any]:
    """The description of a server."""
    _, definitions = models_json_schema(
        [(one.asked, "validation") for one in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    structs = {one for body in BODIES.values() for one in (body.answer, *body.chunks)}
    structs |= {one for one in PAGES.values() if not isinstance(one, str)} | {Errors}
    components: dict[str, Any] = {"schemas": definitions["$defs"] | _structs(structs)}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"benthic: {config.model_name}", "version": __version__},
        "components": components,
        "paths": {path: {"post": _post(body)} for path, body in BODIES.items()}
        | {path: {"get": _get(path, content)} for path, content in PAGES.items()},
    }
    if config.key_digests:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in description["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
                if path not in OPEN_PATHS:
                    operation["responses"]["401"] = _failed("no valid API key")
    return description


def _structs(structs: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    template = "#/components/schemas/" + _ANSWERS
    _, found = msgspec.json.schema_components(sorted(structs, key=lambda one: one.__name__), ref_template=template)
    for schema in found.values():
        schema["additionalProperties"] = False
    return {_ANSWERS.format(name=name): schema for name, schema in found.items()}


def _post(body: Body) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(body.answer)}}
    if body.chunks:
        content["text/event-stream"] = {"schema": _event(body.chunks)}
    asked = {"$ref": f"#/components/schemas/{body.asked.__name__}"}
    return {
        "summary": body.asked.__doc__,
        "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
        "responses": {"200": {"description": "the answer", "content": content}}
        | {status: _failed(text) for status, text in _STATUSES.items()},
    }


def _event(chunks: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    """One event of a stream: a chunk, an error that came up on the way, or the end's mark."""
    told = {"anyOf": [_reference(one) for one in (*chunks, Errors)]}
    content = {"contentMediaType": "application/json", "contentSchema": told}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, content]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _get(path: str, content: type[msgspec.Struct] | str) -> dict[str, Any]:
    kind, schema = (content, {}) if isinstance(content, str) else ("application/json", {"schema": _reference(content)})
    responses = {"200": {"description": "the answer", "content": {kind: schema}}}
    operation: dict[str, Any] = {"responses": responses}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        responses["404"] = _failed("no such model")
    if content is Health:
        responses["503"] = {"description": "the engine is not ready", "content": {kind: schema}}
    return operation


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": "#/components/schemas/" + _ANSWERS.format(name=struct.__name__)}


def _failed(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _reference(Errors)}}}

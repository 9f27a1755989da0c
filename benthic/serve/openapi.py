"""/openapi.json: made from the models that requests are checked by, so it cannot say anything else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from benthic import __version__
from benthic.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from benthic.serve.response_requests import ResponsesRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "the request is wrong",
    "401": "no valid API key",
    "404": "no such model",
    "408": "the body came too slowly",
    "413": "the body is too long",
    "415": "the body is not application/json",
    "429": "too many requests wait",
    "503": "the engine is not ready",
}


def openapi(model: str) -> dict[str, Any]:
    """The description of a server of `model`."""
    _, definitions = models_json_schema(
        [(one, "validation") for one in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    paths = {path: {"post": _operation(one)} for path, one in BODIES.items()}
    gets = ("/v1/models", "/health", "/metrics", "/openapi.json")
    return {
        "openapi": "3.1.0",
        "info": {"title": f"benthic: {model}", "version": __version__},
        "components": {
            "schemas": {**definitions["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
        "paths": {**paths, **{path: {"get": {"responses": _responses({})}} for path in gets}},
    }


def _operation(model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    return {"summary": model.__doc__, "requestBody": body, "responses": _responses(_STATUSES)}


def _responses(errors: dict[str, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    wrong = {status: {"description": text, "content": content} for status, text in errors.items()}
    return {"200": {"description": "the answer"}, **wrong}

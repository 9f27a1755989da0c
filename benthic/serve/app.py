"""The ASGI application: which path does what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from benthic.serve.chat import chat
from benthic.serve.completions import completions
from benthic.serve.conversation import prompt_of, refuse_many, tokens_of
from benthic.serve.engine_client import State
from benthic.serve.event_stream import while_connected
from benthic.serve.guard import Guard
from benthic.serve.openapi import openapi
from benthic.serve.refusal import Refusal, wrong
from benthic.serve.requests import DetokenizeRequest, TokenizeRequest
from benthic.serve.responses import kept_response, responses
from benthic.serve.service import Service
from benthic.serve.wire import Health, Model, Models, Text, TokenIds, encode

Endpoint = Callable[[Request, Service], Awaitable[ASGIApp]]


def make_app(service: Service) -> Guard:
    """The application, behind its guard."""
    routes = [
        Route(path, _with(service, endpoint), methods=[method], include_in_schema=False)
        for (method, path), endpoint in ENDPOINTS.items()
    ]
    app = Router(routes, redirect_slashes=False)
    return Guard(app, service, frozenset(path for _, path in ENDPOINTS))


async def health(request: Request, service: Service) -> Response:
    """200 as long as the engine was heard lately; nothing is asked of it."""
    client = service.client
    if service.draining:
        status = "draining"
    elif client.state is not State.READY:
        status = client.state.value
    else:
        status = "ok" if client.is_healthy else "silent"
    content = encode(Health(status, round(client.silence, 3)))
    return Response(content, 200 if status == "ok" else 503, media_type="application/json")


async def metrics(request: Request, service: Service) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request, service: Service) -> Response:
    """The one model."""
    return Response(encode(Models(data=[_model(service)])), media_type="application/json")


async def model(request: Request, service: Service) -> Response:
    """The one model, by its name."""
    if request.path_params["name"] != service.config.model_name:
        raise Refusal(404, "there is no such model here", param="model", code="model_not_found")
    return Response(encode(_model(service)), media_type="application/json")


async def tokenize(request: Request, service: Service) -> Response:
    """Token ids of a text, or of a conversation."""
    asked = await service.read(request, TokenizeRequest)
    if (asked.prompt is None) == (asked.messages is None):
        raise wrong("send one of prompt and messages", "prompt")
    tokenizer, messages = service.tokenizer, asked.messages or []
    refuse_many(messages, service.config.limits.messages)
    if asked.prompt is not None:
        add_bos = asked.add_special_tokens and tokenizer.add_bos_token
        ids = await while_connected(request, tokens_of(tokenizer, asked.prompt, add_bos))
    else:
        conversation = prompt_of(tokenizer, messages, add_generation_prompt=asked.add_generation_prompt)
        ids = await while_connected(request, conversation)
    ready = service.client.ready
    content = TokenIds(len(ids), ready.longest if ready else None, ids)
    if asked.return_token_strs:
        spelled = {one: tokenizer.decode([one]) for one in set(ids)}
        content.token_strs = [spelled[one] for one in ids]
    return Response(encode(content), media_type="application/json")


async def detokenize(request: Request, service: Service) -> Response:
    """The text of token ids."""
    asked = await service.read(request, DetokenizeRequest)
    return Response(encode(Text(service.tokenizer.decode(asked.tokens))), media_type="application/json")


async def embeddings(request: Request, service: Service) -> Response:
    """Not what these models are for."""
    raise Refusal(501, "this model generates text; it makes no embeddings", code="unsupported_endpoint")


async def description(request: Request, service: Service) -> Response:
    """What this server takes, as OpenAPI 3.1."""
    return JSONResponse(openapi(service.config))


ENDPOINTS: dict[tuple[str, str], Endpoint] = {
    ("POST", "/v1/chat/completions"): chat,
    ("POST", "/v1/completions"): completions,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{name:path}"): model,
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/v1/responses"): responses,
    ("GET", "/v1/responses/{id}"): kept_response,
    ("DELETE", "/v1/responses/{id}"): kept_response,
    ("POST", "/v1/responses/{id}/cancel"): kept_response,
    ("GET", "/v1/responses/{id}/input_items"): kept_response,
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
    ("GET", "/health"): health,
    ("GET", "/metrics"): metrics,
    ("GET", "/openapi.json"): description,
}


def _model(service: Service) -> Model:
    ready = service.client.ready
    return Model(id=service.config.model_name, created=service.started, max_model_len=ready.longest if ready else None)


def _with(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[ASGIApp]]:
    @functools.wraps(endpoint)
    async def bound(request: Request) -> ASGIApp:
        return await endpoint(request, service)

    return bound

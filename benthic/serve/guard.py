"""Guard: every request passes here first. Keys, headers, errors in OpenAI's shape, a log line, and a count."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benthic.log import logger
from benthic.serve.keys import Keys
from benthic.serve.refusal import Refusal
from benthic.serve.service import Service

OPEN_PATHS = frozenset({"/health"})
_ROUTING = {
    404: Refusal(404, "there is nothing at this address", code="unknown_url"),
    405: Refusal(405, "this address takes another method", code="method_not_allowed"),
}
_REQUEST_ID = re.compile(rb"[\w.-]{1,128}")


class Guard:
    """The outermost ASGI application. The path is the one that the server read from the request's first line; no header
    has a say in it."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths
        self._keys = Keys(service.config.key_digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, send)
        self._service.enter()
        try:
            self._check(scope)
            scope["app"] = self  # starlette's routes then raise HTTPException instead of answering in plain text
            await self._app(scope, receive, exchange.send)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except HTTPException as error:
            await exchange.refuse(_ROUTING[error.status_code], dict(error.headers or {}))
        except ClientDisconnect:
            logger.info("server: %s %s left", scope["method"], escaped(scope["path"]))
        except Exception:
            logger.exception("server: %s %s failed", scope["method"], escaped(scope["path"]))
            await exchange.refuse(Refusal(500, "the server failed to answer", "server_error", code="internal_error"))
        finally:
            self._service.leave()
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.responded(path, exchange.status or 499)
            if path not in ("/health", "/metrics"):
                self._log(scope, exchange)

    def _check(self, scope: Scope) -> None:
        limits, headers = self._service.config.limits, scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.headers or size > limits.header_bytes:
            raise Refusal(431, f"at most {limits.headers} headers and {limits.header_bytes} bytes are allowed")
        scope["salt"] = "" if scope["path"] in OPEN_PATHS else self._keys.admit(headers)

    def _log(self, scope: Scope, exchange: _Exchange) -> None:
        client = scope.get("client") or ("?", "?")
        logger.info(
            "%s %s %s %s %d %.3f s %s",
            client[0],
            scope["method"],
            escaped(scope["path"]),
            escaped(str(scope.get("user", "-"))),
            exchange.status or 499,
            time.monotonic() - exchange.began,
            exchange.request_id.decode(),
        )


class _Exchange:
    """One request's response: its status once it began, and the headers that all responses have."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.began = time.monotonic()
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        is_fine = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        self.request_id = given[0] if is_fine else uuid.uuid4().hex.encode()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id)]
            message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
        await self._send(message)

    async def refuse(self, refusal: Refusal, more_headers: Mapping[str, str] | None = None) -> None:
        """Nothing can be said once a response began: it stays incomplete, and so the client knows."""
        if self.status is not None:
            return
        body = refusal.body
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **refusal.headers,
            **(more_headers or {}),
        }
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})


def escaped(text: str) -> str:
    """One line, whatever somebody put into it, and not a long one."""
    return text[:200].encode("unicode_escape").decode("ascii")

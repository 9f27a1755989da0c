"""Remote: a model behind an OpenAI-compatible address. The standard library speaks HTTP well enough for one stream."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import SplitResult, urlsplit

from benthic import __version__
from benthic.cli.terminal import printable
from benthic.errors import ConfigError, RequestError
from benthic.serve.parts import Content, Reasoning

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0
"""A long prompt on a slow machine takes minutes before the first token."""
LONGEST_ERROR = 65536


class Remote:
    """One model of the server at `url`, with or without its /v1; the only one it has where `model` is None.
    `names` are all that it has.

    Raises ConfigError for a wrong address, RequestError where the server cannot be used.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None) -> None:
        self.url, self._parts = url, server_address(url)
        self._headers = {"content-type": "application/json", "user-agent": f"benthic/{__version__}"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self.names = self._list()
        if model is None and len(self.names) != 1:
            raise ConfigError(f"{url} has {len(self.names)} models: {', '.join(self.names)}", hint="--model names one")
        self.model = self.names[0] if model is None else model

    def chat(
        self, messages: Sequence[dict[str, str]], parameters: dict[str, Any]
    ) -> Generator[Content | Reasoning, None, None]:
        """The answer's parts as they come; closing the generator makes the server stop. Raises RequestError."""
        asked = {"model": self.model, "messages": list(messages), "stream": True, **parameters}
        body = json.dumps(asked).encode()
        with (
            closing(self._open()) as connection,
            closing(self._send(connection, "POST", "/v1/chat/completions", body)) as response,
        ):
            for event in self._events(response):
                yield from _parts(event)

    def _list(self) -> list[str]:
        with closing(self._open()) as connection, closing(self._send(connection, "GET", "/v1/models")) as response:
            body = self._read(response)
        try:
            return [str(one["id"]) for one in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{self.url} lists its models in no way that OpenAI's clients know") from None

    def _open(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS)
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        prefix = self._parts.path.rstrip("/").removesuffix("/v1")
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_SECONDS)
            connection.request(method, prefix + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        if response.status != 200:
            raise self._refused(response)
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The objects of a stream of events, until it says that it is done."""
        while True:
            try:
                line = response.readline()
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from None
            if not line:
                raise RequestError(f"{self.url} ended its answer before it was complete")
            if not line.startswith(b"data:"):
                continue
            content = line.removeprefix(b"data:").strip()
            if content == b"[DONE]":
                return
            try:
                event = json.loads(content)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise RequestError(f"{self.url} sent what is no JSON object: {printable(str(content[:200]))}")
            if "error" in event:
                raise RequestError(f"{self.url} failed: {_message(content)}")
            yield event

    def _unreachable(self, error: Exception) -> RequestError:
        match error:
            case ConnectionRefusedError():
                return RequestError(f"nothing listens at {self.url}", hint="benthic serve FOLDER starts a server")
            case socket.gaierror():
                return RequestError(f"there is no host {self._parts.hostname!r}: {error.strerror}")
            case TimeoutError():
                return RequestError(f"{self.url} does not answer")
            case ssl.SSLError():
                return RequestError(f"no secure connection to {self.url}: {error.reason or error}")
            case http.client.HTTPException() if not isinstance(error, OSError):
                return RequestError(f"{self.url} broke off, or does not speak HTTP: {printable(str(error)[:200])}")
        return RequestError(f"the connection to {self.url} broke: {error}")

    def _refused(self, response: http.client.HTTPResponse) -> RequestError:
        try:
            with response:
                body = response.read(LONGEST_ERROR)
        except (OSError, http.client.HTTPException):
            body = b""
        wait = response.getheader("retry-after")
        hints = {
            401: "--api-key-env NAME or --api-key-file FILE gives the key",
            403: "--api-key-env NAME or --api-key-file FILE gives the key",
            404: "--url is the server's root, as http://127.0.0.1:8000; --model names a model that it has",
            429: f"it is busy; ask again in {printable(wait)} s" if wait else "it is busy; ask again later",
            503: "it is loading, or about to stop; ask again later",
        }
        return RequestError(
            f"{self.url} answered {response.status}: {_message(body) or printable(response.reason)}",
            hint=hints.get(response.status),
        )


def server_address(url: str) -> SplitResult:
    """The parts of a server's address. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        found = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        parts, found = urlsplit(""), False
    if not found:
        raise ConfigError(f"--url {url!r} is no address of a server", hint="such as http://127.0.0.1:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("--url has a user, a query or a fragment; give scheme, host and port alone")
    return parts


def _message(body: bytes) -> str:
    """What an error's body says, in OpenAI's shape or another."""
    try:
        said = json.loads(body)
    except ValueError:
        said = body.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    return printable(said if isinstance(said, str) else json.dumps(said))[:500].strip()


def _parts(event: dict[str, Any]) -> Iterator[Content | Reasoning]:
    """What one chunk adds; servers name the thought in one way or the other, or in both."""
    try:
        deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
        thought = "".join(one.get("reasoning_content") or one.get("reasoning") or "" for one in deltas)
        content = "".join(one.get("content") or "" for one in deltas)
    except (AttributeError, TypeError):
        raise RequestError(
            f"the server sent what is no chunk of a chat: {printable(json.dumps(event)[:200])}"
        ) from None
    if thought:
        yield Reasoning(thought)
    if content:
        yield Content(content)

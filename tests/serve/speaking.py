"""HTTP spoken to a running server: JSON, and bytes as they are."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing, suppress

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "def add"}]


def post(server, path, body, **headers):
    """Status and JSON of one request; `body` is JSON data, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.request("POST", path, content, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def assert_refused(answer, status, param=None, code=None):
    got, body = answer
    assert got == status, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    if param is not None:
        assert body["error"]["param"] == param, body
    if code is not None:
        assert body["error"]["code"] == code, body


def raw(server, content, seconds=10):
    """What comes back for bytes as they are, until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as one:
        one.sendall(content)
        received = b""
        try:
            while part := one.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
    return received

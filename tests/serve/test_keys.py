"""Who has no key sees /health and nothing else, whatever the first line and the headers claim."""

from __future__ import annotations

import contextlib

import pytest

from benthic.serve.keys import Keys, digest
from benthic.serve.refusal import Refusal
from tests.serve.speaking import raw

KEY = "s" * 32

LINES = [
    *(
        f"GET {path}"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/tiny", "/", "/docs", "/nothing")
    ),
    *(f"POST {path}" for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")),
    *(f"POST {path}" for path in ("/tokenize", "/detokenize", "/health/", "/v1/models")),
    *(f"{method} /v1/models" for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "BREW")),
    "GET /v1/models?/health",
    "GET /v1/models?path=/health",
    "GET //v1/models",
    "GET //health",
    "GET /health/../v1/models",
    "GET /v1/../v1/models",
    "GET /health/%2e%2e/v1/models",
    "GET /%2e/v1/models",
    "GET /health%2f..%2fv1/models",
    "GET /health;/../v1/models",
    "GET /v1/models;/health",
    "GET /V1/MODELS",
    "GET /HEALTH",
    "GET /health%00/v1/models",
    "GET http://x/v1/models",
    "GET http://x/health/../v1/models",
]
HEADERS = [
    "host: x/health?",
    "host: x\r\nx-original-url: /health",
    "host: x\r\nx-rewrite-url: /health",
    "host: x\r\nx-forwarded-prefix: /health",
    "host: x\r\nx-forwarded-for: 127.0.0.1",
    f"host: x\r\nx-api-key: {KEY}",
    f"host: x\r\ncookie: authorization=Bearer {KEY}",
    f"host: x\r\nauthorization: {KEY}",
    f"host: x\r\nauthorization: Basic {KEY}",
    f"host: x\r\nauthorization: Bearer{KEY}",
    f"host: x\r\nauthorization: Bearer {KEY}x",
    f"host: x\r\nauthorization: Bearer {KEY[:-1]}",
    f"host: x\r\nauthorization: Bearer {KEY.upper()}",
    f"host: x\r\nauthorization: Bearer {KEY} {KEY}",
    f"host: x\r\nauthorization: Bearer {KEY}\r\nauthorization: Bearer {KEY}",
    f"host: x\r\nauthorization: Bearer wrong\r\nauthorization: Bearer {KEY}",
    "host: x\r\nauthorization: Bearer " + "k" * 10_000,
    "host: x\r\nauthorization: Bearer ",
    "host: x\r\nauthorization:",
]


@pytest.fixture(scope="module")
def locked(start, tmp_path_factory):
    """A server with one key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    server = start("--api-key-file", str(keys)).wait_until_ready()
    yield server
    server.stop()


def answer_to(server, line, headers="host: x"):
    return raw(server, f"{line} HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\n".encode())


def test_without_a_key_everything_but_health_is_a_401(locked):
    requests = [(line, "host: x") for line in LINES] + [("GET /v1/models", headers) for headers in HEADERS]
    assert len(requests) >= 40
    for line, headers in requests:
        received = answer_to(locked, line, headers)
        status = received.split(b"\r\n")[0]
        # The parser of HTTP refuses some lines before anybody asks for a key: that opens nothing either.
        assert b" 401 " in status or b" 400 " in status, (line, headers, received[:200])
        assert b'"tiny"' not in received
        assert b"vllm:" not in received
        if b" 401 " in status and not line.startswith("HEAD"):
            assert b'"code":"invalid_api_key"' in received, line


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_opens_however_its_scheme_is_written(locked, scheme):
    assert (
        b" 200 " in answer_to(locked, "GET /v1/models", f"host: x\r\nauthorization: {scheme} {KEY}").split(b"\r\n")[0]
    )
    assert b" 200 " in answer_to(locked, "GET /health").split(b"\r\n")[0]


def test_every_key_is_compared_whichever_was_given(monkeypatch):
    """Time tells nothing: as many comparisons, of digests of one length, for any key."""
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("benthic.serve.keys.hmac.compare_digest", compare)
    keys = Keys([digest(name * 32) for name in (b"a", b"b", b"c")])
    counts = []
    for given in (b"a" * 32, b"c" * 32, b"a" * 31, b"", b"z" * 10_000):
        compared.clear()
        with contextlib.suppress(Refusal):
            keys.admit([(b"authorization", b"Bearer " + given)])
        counts.append(list(compared))
    assert counts == [[(32, 32)] * 3] * 5

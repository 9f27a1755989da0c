"""What a client writes stays on its own line of the log, and sends nothing to a terminal."""

from __future__ import annotations

import json

import pytest

from tests.serve.speaking import PLAIN, post, raw

EVIL = ["\n", "\r\n", "\r", "\x1b[31m", "\x1b]0;x\x07", "\x9b2J", "\u2028", "\x0b", "\x85", "\x08\x08"]


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_no_field_and_no_path_makes_a_line(server, evil):
    mark = f"M{EVIL.index(evil)}"
    before = len(server.log.read_bytes())
    for field in ("user", "model", "cache_salt", "prompt", "stop"):
        post(server, PLAIN, {"prompt": "x", "max_tokens": 1, field: f"{mark}a{evil}FORGED"})
    post(server, PLAIN, {"prompt": "x", "max_tokens": 1, f"{mark}b{evil}FORGED": 1})
    post(server, PLAIN, json.dumps({"prompt": "x"}).encode(), **{"content-type": f"{mark}c FORGED"})
    path = "".join(f"%{byte:02x}" for byte in evil.encode())
    raw(
        server,
        f"GET /{mark}d{path}FORGED HTTP/1.1\r\nhost: x\r\nx-request-id: a b\r\nconnection: close\r\n\r\n".encode(),
    )
    raw(server, f"GET /{mark}e HTTP/1.1\r\nhost: x\r\nx-request-id: {'i' * 200}\r\nconnection: close\r\n\r\n".encode())
    server.wait_for(lambda: f"{mark}e" in server.log.read_text())
    added = server.log.read_bytes()[before:]
    assert b"FORGED" in added
    lines = added.decode().split("\n")
    assert not any(line.startswith("FORGED") for line in added.decode().splitlines())
    assert all(character.isprintable() for line in lines for character in line)
    assert "i" * 200 not in added.decode()

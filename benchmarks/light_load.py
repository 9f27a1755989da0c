"""Streaming clients that cost next to nothing: one thread, raw sockets, no JSON read but the usage at the end."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benthic.errors import RunError

_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_TAIL = 4096


@dataclass(frozen=True, slots=True)
class Load:
    """What all streams together took. `processor_seconds` are this client's own."""

    seconds: float
    tokens: int
    chunks: int
    processor_seconds: float


def stream_all(port: int, bodies: Sequence[bytes], silence_seconds: float = 120.0) -> Load:
    """Send every body to /v1/completions at once, each over a connection of its own, and read until all are done.

    Raises RunError where one is refused, breaks off, or nothing comes for `silence_seconds`.
    """
    began, busy = time.perf_counter(), time.process_time()
    tokens = chunks = 0
    with selectors.DefaultSelector() as selector:
        for body in bodies:
            one = socket.create_connection(("127.0.0.1", port), timeout=silence_seconds)
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            one.sendall(head.encode() + body)
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            ready = selector.select(silence_seconds)
            if not ready:
                raise RunError(f"the server sent nothing for {silence_seconds:g} s")
            for key, _ in ready:
                content = key.fileobj.recv(65536)
                tail: bytearray = key.data
                chunks += content.count(b"data: ")
                tail += content
                if not content or tail.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
                    raise RunError(f"the server broke off: {bytes(tail[-300:])!r}")
                if tail.endswith(b"0\r\n\r\n"):
                    usage = _USAGE.search(tail)
                    if usage is None or b"[DONE]" not in tail:
                        raise RunError(f"a stream ended without its usage: {bytes(tail[-300:])!r}")
                    tokens += int(usage[1])
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                del tail[:-_TAIL]
        seconds = time.perf_counter() - began
    return Load(seconds, tokens, chunks, time.process_time() - busy)

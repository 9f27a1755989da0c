"""A client for load: asyncio and bare sockets, so that it can leave at any moment and knows when each event came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass
class Outcome:
    """What came back. `times` are those of the events of a stream; `status` 0 means nothing came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)
    has_done: bool = False
    has_left: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def first(self) -> float:
        """Seconds to the first event."""
        return self.times[0] - self.began

    @property
    def pace(self) -> float:
        """Mean seconds from event to event."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)

    @property
    def text(self) -> str:
        """Of the first answer of a plain completion."""
        if self.body:
            return self.body["choices"][0]["text"]
        return "".join(choice["text"] for one in self.events for choice in one.get("choices", []))

    @property
    def last(self) -> dict[str, Any]:
        """The body, or the last event."""
        return self.body or self.events[-1]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The error of the body, or those among the events."""
        return [one["error"] for one in (self.body, *self.events) if "error" in one]


def head_of(path: str, content: bytes, key: str | None = None) -> bytes:
    """A POST of JSON."""
    who = f"authorization: Bearer {key}\r\n" if key else ""
    lines = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n{who}"
    return f"{lines}content-length: {len(content)}\r\n\r\n".encode() + content


async def ask(
    port: int,
    path: str,
    body: dict[str, Any],
    leaves: Callable[[Outcome], bool] | None = None,
    *,
    patience: float | None = None,
    key: str | None = None,
    abrupt: bool = False,
) -> Outcome:
    """One request on a connection of its own, to its end; or until `leaves` says so of what came, or after `patience`
    seconds. Who leaves `abrupt`ly resets the connection."""
    outcome = Outcome(began=time.monotonic())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        writer.write(head_of(path, json.dumps(body).encode(), key))
        async with asyncio.timeout(patience):
            await _read(reader, outcome, leaves)
    except TimeoutError:
        outcome.has_left = True
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        if abrupt and outcome.has_left:
            one = writer.get_extra_info("socket")
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    outcome.ended = time.monotonic()
    return outcome


async def _read(reader: asyncio.StreamReader, outcome: Outcome, leaves: Callable[[Outcome], bool] | None) -> None:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    outcome.status = int(lines[0].split()[1])
    outcome.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    if "content-length" in outcome.headers:
        outcome.body = json.loads(await reader.readexactly(int(outcome.headers["content-length"])))
        return
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for one in whole:
            if one == b"data: [DONE]":
                outcome.has_done = True
            elif one.startswith(b"data: "):
                outcome.times.append(time.monotonic())
                outcome.events.append(json.loads(one[6:]))
        if leaves is not None and leaves(outcome):
            outcome.has_left = True
            return


def quantile(values: list[float], share: float) -> float:
    """Of at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

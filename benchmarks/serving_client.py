"""An asyncio client of POST /v1/completions that times chunks: HTTP/1.1 over kept connections, and no more.

It adds tens of microseconds to a chunk where general clients add hundreds, which on a small machine the server would
otherwise seem to take.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import SplitResult

from benchmarks.serving_metrics import Timed
from benthic.cli.terminal import printable

LONGEST_LINE = 2**24
BROKEN = (OSError, EOFError, asyncio.LimitOverrunError, ValueError, KeyError, TypeError, AttributeError)
"""What a connection that ends, or a server that says something else than chunks, gives."""


class Failure(Exception):
    """A request's own; its text is what it is counted under."""


class ServingClient:
    """Requests to one server. Connections are opened as needed and used again."""

    def __init__(self, address: SplitResult, key: str | None = None) -> None:
        self._host, self._is_secure = address.hostname or "", address.scheme == "https"
        self._port = address.port or (443 if self._is_secure else 80)
        self._path = address.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._authorization = "" if key is None else f"authorization: Bearer {key}\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def time(self, asked: dict[str, Any], seconds: float) -> Timed:
        """The times of one streamed answer, failed after `seconds`."""
        timed = Timed()
        try:
            async with asyncio.timeout(seconds):
                await self._time(json.dumps(asked).encode(), timed)
        except TimeoutError:
            timed.error = f"no complete answer within {seconds:g} s"
        except BROKEN as error:
            timed.error = f"the connection or its content broke: {type(error).__name__}: {error}"
        except Failure as error:
            timed.error = str(error)
        return timed

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _time(self, body: bytes, timed: Timed) -> None:
        began = last = time.perf_counter()
        reader, writer = await self._connection()
        is_done = is_told = False
        try:
            writer.write(self._head(len(body)) + body)
            status, headers = await _read_head(reader)
            if status != 200:
                raise Failure(f"{status}: {await _message(reader, headers)}")
            async for line in _lines(_content(reader, headers)):
                if not line.startswith(b"data:"):
                    continue
                content = line.removeprefix(b"data:").strip()
                if content == b"[DONE]":
                    is_done = True
                    continue
                chunk = json.loads(content)
                if "error" in chunk:
                    raise Failure(f"in the stream: {_said(content)}")
                if chunk.get("choices"):
                    now = time.perf_counter()
                    if timed.ttft:
                        timed.itl.append(now - last)
                    else:
                        timed.ttft = now - began
                    last, timed.latency = now, now - began
                elif usage := chunk.get("usage"):
                    timed.prompt_tokens, timed.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    is_told = True
            if not (is_done and is_told and timed.ttft):
                missing = "[DONE]" if not is_done else "its usage" if not is_told else "a choice"
                raise Failure(f"the stream ended without {missing}")
        except BaseException:
            writer.close()
            raise
        if headers.get("connection", "").lower() == "close" or "transfer-encoding" not in headers:
            writer.close()
        else:
            self._idle.append((reader, writer))

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port, ssl=self._is_secure or None, limit=LONGEST_LINE)

    def _head(self, length: int) -> bytes:
        return (
            f"POST {self._path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\n{self._authorization}\r\n"
        ).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    fields = first.split(" ", 2)
    if len(fields) < 2 or not fields[0].startswith("HTTP/1.") or not fields[1].isdigit():
        raise Failure(f"no HTTP: {printable(first)[:80]}")
    pairs = (line.partition(":") for line in lines)
    return int(fields[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _content(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body's bytes as they come."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        left = int(headers.get("content-length", 2**62))
        while left and (piece := await reader.read(min(left, 65536))):
            left -= len(piece)
            yield piece
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _lines(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = b""
    async for piece in content:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            yield line


async def _message(reader: asyncio.StreamReader, headers: dict[str, str]) -> str:
    return _said(b"".join([piece async for piece in _content(reader, headers)]))


def _said(body: bytes) -> str:
    """An error in OpenAI's shape, or the beginning of what came instead."""
    try:
        return printable(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return printable(body[:200].decode(errors="replace"))

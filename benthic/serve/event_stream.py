"""EventStream: server-sent events to one client, for as long as it reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from benthic.config.serve import Limits
from benthic.log import logger
from benthic.serve.refusal import Refusal

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_SECONDS = 15.0


def event(content: bytes, name: str = "") -> bytes:
    """One JSON object as an event, with a name where it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + content + b"\n\n"


class EventStream:
    """An ASGI response. `end` is called when all is sent, and when the client leaves or does not read.

    A Refusal on the way is the last event but `done`, and so is whatever else fails: the status was sent long ago.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], end: Callable[[], None], limits: Limits, done: bytes = DONE
    ) -> None:
        self._events, self._end, self._limits, self._done = events, end, limits, done
        self._changed, self._sending = time.monotonic(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        writing = asyncio.create_task(self._write(headers, send))
        watching = asyncio.create_task(self._watch(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((writing, watching, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (leaving, watching, writing):
                task.cancel()  # nothing happens to one that is done
            await asyncio.gather(writing, watching, leaving, return_exceptions=True)
            self._end()
            await self._events.aclose()
        for task in (writing, watching):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _write(self, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for content in self._events:
                await self._send(send, {"type": "http.response.body", "body": content, "more_body": True})
            last = self._done
        except Refusal as refusal:
            last = event(refusal.body) + self._done
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("server: a stream failed")
            failure = Refusal(500, "the server failed to answer", "server_error", code="internal_error")
            last = event(failure.body) + self._done
        await self._send(send, {"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        self._sending, self._changed = self._sending + 1, time.monotonic()
        await send(message)
        self._sending, self._changed = self._sending - 1, time.monotonic()

    async def _watch(self, send: Send) -> None:
        """Look now and then, which costs less than a clock for each event: raise ClientDisconnect where the client
        does not read, and write a comment where there is nothing to read, so that nothing between thinks them dead."""
        seconds = self._limits.send_seconds
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            idle = time.monotonic() - self._changed
            if self._sending and idle > seconds:
                logger.info("server: closed a client that read nothing for %g s", seconds)
                raise ClientDisconnect
            if not self._sending and idle > PING_SECONDS:
                try:
                    async with asyncio.timeout(seconds):
                        await self._send(send, {"type": "http.response.body", "body": PING, "more_body": True})
                except TimeoutError:
                    raise ClientDisconnect from None


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

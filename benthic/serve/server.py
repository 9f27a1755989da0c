"""The server's process: HTTP by granian on one event loop, the engine beside it, and how both end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server as Granian

from benthic.config.serve import ServeConfig
from benthic.errors import RunError
from benthic.log import logger
from benthic.serve.app import make_app
from benthic.serve.engine_client import EngineClient
from benthic.serve.form_check import FormCheck
from benthic.serve.messages import Ready, Start
from benthic.serve.metrics import Metrics
from benthic.serve.service import Service
from benthic.text import Tokenizer

TOKENISING_THREADS = 4
"""Few, so that all of them, each with memory of its own, are there soon; and several, as one may have a long text."""


def serve(
    config: ServeConfig, start: Start, tokenizer: Tokenizer, on_ready: Callable[[Ready], None] = lambda ready: None
) -> None:
    """Serve until SIGTERM or SIGINT. The first waits for answers on their way, the second does not.

    `on_ready` is called each time an engine is loaded. Raises BenthicError where the engine cannot be started, and
    RunError where the address cannot be used.
    """
    require_address(config)
    asyncio.run(_Life(config, start, tokenizer).live(on_ready))


class _Life:
    """From start to end."""

    def __init__(self, config: ServeConfig, start: Start, tokenizer: Tokenizer) -> None:
        self._config = config
        self._client = EngineClient(start, config.limits)
        forms = FormCheck(config.limits.compile_seconds)
        self._service = Service(config, self._client, tokenizer, forms, Metrics(config.model_name, self._client))
        self._ending = asyncio.Event()
        self._now = asyncio.Event()

    async def live(self, on_ready: Callable[[Ready], None]) -> None:
        """All of it."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(TOKENISING_THREADS, "tokenise"))
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._signal)
        http = self._granian()
        tasks = {
            "http": asyncio.create_task(http.serve()),
            "engine": asyncio.create_task(self._client.run()),
            "plan": asyncio.create_task(self._announce(on_ready)),
            "end": asyncio.create_task(self._drain()),
        }
        try:
            lasting = {task for name, task in tasks.items() if name != "plan"}
            done, _ = await asyncio.wait(lasting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._client.stop()
            await self._service.forms.close()
            http.stop()
            tasks["plan"].cancel()
            tasks["end"].cancel()
            await asyncio.wait(tasks.values(), timeout=3)

    def _signal(self) -> None:
        if self._ending.is_set():
            self._now.set()
        self._ending.set()

    async def _drain(self) -> None:
        await self._ending.wait()
        self._service.draining = True
        answers = self._client.answers
        logger.info("server: ending; %d answers on their way have %g s", answers, self._config.drain_seconds)
        waits = [asyncio.create_task(one) for one in (self._service.quiet.wait(), self._now.wait())]
        await asyncio.wait(waits, timeout=self._config.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for one in waits:
            one.cancel()

    async def _announce(self, on_ready: Callable[[Ready], None]) -> None:
        on_ready(await self._client.loaded())

    def _granian(self) -> Granian:
        config, limits = self._config, self._config.limits
        return Granian(
            make_app(self._service),
            address=config.host,
            port=config.port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            backlog=1024,
            http1_settings=HTTP1Settings(
                header_read_timeout=limits.header_seconds * 1000, max_buffer_size=limits.header_bytes
            ),
            log_enabled=False,
        )


def require_address(config: ServeConfig) -> None:
    """Raise RunError where the address cannot be listened on.

    Granian would share a port with another server, which then got some of the requests.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise RunError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}", hint="choose another --port or --host"
        ) from None

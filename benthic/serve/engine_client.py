"""EngineClient: the server's side of the engine's process. Starts it, hands its words out, and starts it again.

It belongs to one event loop. What an engine that ended had in hand fails with 503.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from benthic.config.serve import Limits
from benthic.errors import RunError
from benthic.log import logger
from benthic.serve.mailbox import Mailbox
from benthic.serve.messages import (
    LENGTH_BYTES,
    Add,
    Added,
    Cancel,
    Cancelled,
    Counts,
    Delta,
    Fatal,
    LayerLoad,
    Loads,
    Order,
    Ready,
    Refused,
    Report,
    Sampling,
    Start,
    Step,
    length_of,
    packed,
    read_report,
)
from benthic.serve.refusal import Refusal, unavailable, wrong

ENGINE = ("-m", "benthic.serve.engine_process")
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 60.0
"""An engine that ran this long and then failed is started again at once."""


class State(Enum):
    """Of the engine's process."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(slots=True)
class _Outstanding:
    """A request that the engine has: whose mail its deltas are, and from which answer of that one on."""

    mailbox: Mailbox
    first: int
    missing: int
    admitted: asyncio.Future[None]


@dataclass(slots=True)
class Totals:
    """What engines that ended had counted, and how often one was started again."""

    restarts: int = 0
    counts: Counts = field(default_factory=Counts)


class EngineClient:
    """`run` keeps an engine going until `stop`."""

    def __init__(self, start: Start, limits: Limits) -> None:
        self.start, self.limits = start, limits
        self.state = State.LOADING
        self.ready: Ready | None = None
        self.counts = Counts()
        self.loads: list[LayerLoad] = []
        self.totals = Totals()
        self.failure = ""
        self.mean_seconds = 1.0
        self._heard = time.monotonic()
        self._numbers = itertools.count()
        self._outstanding: dict[int, _Outstanding] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._loaded = asyncio.Event()

    @property
    def silence(self) -> float:
        """Seconds since the engine's last step, or sign of life while idle."""
        return time.monotonic() - self._heard

    @property
    def is_healthy(self) -> bool:
        """Whether the engine is loaded, and was heard lately."""
        return self.state is State.READY and self.silence < self.limits.silence_seconds

    @property
    def answers(self) -> int:
        """Answers that the engine has not ended yet."""
        return sum(one.missing for one in self._outstanding.values())

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Start the engine, and again whenever it ends. Raises BenthicError where starting it again cannot help."""
        pause = 0.0
        while self.state is not State.STOPPED:
            began = time.monotonic()
            try:
                await self._run_once()
            finally:
                self._end_process()
                self._fail_all()
            if self.state is State.STOPPED:
                return
            self.state = State.RESTARTING
            self.totals.restarts += 1
            pause = 0.0 if time.monotonic() - began > STEADY_SECONDS else min(LONGEST_PAUSE, 2 * pause + 0.5)
            logger.error("server: the engine ended (%s); a new one starts in %.1f s", self.failure, pause)
            await asyncio.sleep(pause)

    async def loaded(self) -> Ready:
        """Once the engine is ready."""
        await self._loaded.wait()
        assert self.ready is not None
        return self.ready

    def require(self, answers: int) -> Ready:
        """The engine's sizes, where it can take `answers` more. Raises Refusal 503 and 429."""
        if self.state is not State.READY or self.ready is None:
            raise unavailable(f"the engine is {self.state.value}", f"engine_{self.state.value}")
        most = self.ready.max_sequences + self.limits.queue
        if self.answers + answers > most:
            raise self._full(f"{self.answers} answers are on their way or wait; at most {most} may")
        return self.ready

    def submit(
        self, mailbox: Mailbox, prompt: list[int], sampling: Sampling, salt: str, first: int = 0
    ) -> tuple[int, asyncio.Future[None]]:
        """Ask for sampling.n answers, whose deltas come to `mailbox` numbered from `first` on.

        Returns the number to cancel, and what is done once the engine took them in, with a Refusal where it did not.
        """
        number = next(self._numbers)
        admitted = asyncio.get_running_loop().create_future()
        self._outstanding[number] = _Outstanding(mailbox, first, sampling.n, admitted)
        self._send(Add(number, prompt, sampling, salt))
        return number, admitted

    def cancel(self, number: int) -> None:
        """Nobody waits for these answers any more. They count until the engine says that they are gone."""
        if number in self._outstanding:
            self._send(Cancel(number))

    def stop(self) -> None:
        """End the engine now, for good."""
        self.state = State.STOPPED
        self._end_process()

    async def _run_once(self) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs)
        reader, self._writer = await asyncio.open_connection(sock=mine)
        self._heard = time.monotonic()
        self._send(self.start)
        self.failure = "it left without a word"
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                head = await reader.readexactly(LENGTH_BYTES)
                self._take(read_report(await reader.readexactly(length_of(head))))
        except (OSError, EOFError, msgspec.DecodeError) as error:
            logger.debug("server: the engine's connection ended: %s", error)
        finally:
            watch.cancel()
            self._writer.close()

    async def _watch(self) -> None:
        """End an engine that hangs in a step; loading may take as long as it takes."""
        while True:
            await asyncio.sleep(1)
            if self.state is State.READY and self.silence > self.limits.hang_seconds:
                logger.error("server: the engine was silent for %.0f s", self.silence)
                self._end_process()

    def _take(self, report: Report) -> None:
        self._heard = time.monotonic()
        match report:
            case Step():
                for delta in report.deltas:
                    self._deliver(delta)
                self.counts = report.counts
            case Loads():
                self.loads = report.layers
            case Added():
                self._settle(report.request, None)
            case Refused():
                self._settle(report.request, self._full(report.message) if report.is_full else wrong(report.message))
                self._forget(report.request)
            case Cancelled():
                self._forget(report.request)
            case Ready():
                self.ready, self.state = report, State.READY
                self._loaded.set()
            case Fatal():
                self.failure = report.message
                if report.is_mistake and self.ready is None:
                    raise RunError(report.message, report.hint)

    def _deliver(self, delta: Delta) -> None:
        one = self._outstanding.get(delta.request)
        if one is None:
            return
        one.mailbox.put(msgspec.structs.replace(delta, index=one.first + delta.index))
        if delta.finish is not None:
            one.missing -= 1
            if not one.missing:
                self._forget(delta.request)

    def _settle(self, number: int, refusal: Refusal | None) -> None:
        one = self._outstanding.get(number)
        if one is None or one.admitted.done():
            return
        if refusal is None:
            one.admitted.set_result(None)
        else:
            one.admitted.set_exception(refusal)

    def _forget(self, number: int) -> None:
        self._outstanding.pop(number, None)

    def _full(self, message: str) -> Refusal:
        seconds = max(1, min(60, round(self.mean_seconds)))
        return Refusal(429, message, "rate_limit_error", code="queue_full", retry_after=seconds)

    def _fail_all(self) -> None:
        failure = unavailable(f"the engine failed: {self.failure}", "engine_failed")
        for number, one in list(self._outstanding.items()):
            self._settle(number, failure)
            one.mailbox.fail(failure)
            self._forget(number)
        self.totals.counts = _sum(self.totals.counts, self.counts)
        self.counts, self.loads = Counts(), []

    def _send(self, order: Order) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(packed(order))

    def _end_process(self) -> None:
        """A process that was killed leaves nothing behind, a GPU's memory included."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """A fresh interpreter, in a session of its own: what a terminal sends to the server does not reach it."""
    descriptor = theirs.fileno()
    # -P: a folder that the server happens to be started in gives no modules.
    command = [sys.executable, "-P", *ENGINE, str(descriptor)]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            start_new_session=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
    except OSError as error:
        raise RunError(f"the engine's process cannot be started: {error}") from None


def _sum(before: Counts, last: Counts) -> Counts:
    """Sums add up over engines; what an ended one was busy with is gone."""
    sums = ("steps", "prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens")
    return Counts(**{name: getattr(before, name) + getattr(last, name) for name in (*sums, "preemptions")})

"""The engine's process: `python -m benthic.serve.engine_process DESCRIPTOR` over one end of a socket pair.

Three threads: one reads orders, one writes reports, and the main one steps the engine, so that sending and the server's
work on what was sent overlap with the next step. When the server is gone, however it went, the socket's end says so and
this process ends too.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time

import msgspec
import torch

from benthic.config.engine import EngineConfig
from benthic.errors import BenthicError, CapacityError, ConfigError, RequestError
from benthic.inference.completion import Event
from benthic.inference.engine import Engine
from benthic.log import logger, to_stderr
from benthic.model.sampling import SamplingParams
from benthic.serve.messages import (
    LENGTH_BYTES,
    Add,
    Added,
    Cancel,
    Cancelled,
    Counts,
    Delta,
    Fatal,
    Finish,
    LayerLoad,
    Loads,
    Order,
    PromptLogprobs,
    Ready,
    Refused,
    Report,
    Start,
    Step,
    length_of,
    packed,
    read_order,
)

HEARTBEAT_SECONDS = 0.5
LOADS_SECONDS = 2.0
FAULTS_IN_A_ROW = 3
"""Steps that fail one after another tell of an engine that is broken, and not of requests."""
UNSENT_REPORTS = 256
"""A server that does not read makes the engine wait: memory stays bounded."""


class Channel:
    """The engine's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rwb")
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._reports: queue.Queue[Report | None] = queue.Queue(UNSENT_REPORTS)
        self._writer = threading.Thread(target=self._write, daemon=True)
        threading.Thread(target=self._read, daemon=True).start()
        self._writer.start()

    def send(self, report: Report) -> None:
        """Let `report` be written; waits where too many are."""
        self._reports.put(report)

    def close(self) -> None:
        """Return once everything is written."""
        self._reports.put(None)
        self._writer.join()

    def _read(self) -> None:
        try:
            while head := self._file.read(LENGTH_BYTES):
                self.orders.put(read_order(self._file.read(length_of(head))))
        except (OSError, msgspec.DecodeError) as error:
            logger.error("engine: the connection to the server broke: %s", error)
        # Whatever the engine is busy with, even a call that never comes back: nobody waits for it.
        os._exit(0)

    def _write(self) -> None:
        try:
            while (report := self._reports.get()) is not None:
                self._file.write(packed(report))
                if self._reports.empty():
                    self._file.flush()
            self._file.flush()
        except OSError:
            os._exit(0)


class Served:
    """An engine that does what orders say."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine, self._channel = engine, channel
        self._answers: dict[int, tuple[int, int]] = {}
        self._requests: dict[int, list[int]] = {}
        self._faults = 0

    def run(self) -> None:
        """Orders between steps, for ever."""
        last = looked = time.monotonic()
        while True:
            self._obey(wait=not self._engine.has_work)
            events = self._step()
            now = time.monotonic()
            if events or now - last > HEARTBEAT_SECONDS:
                self._channel.send(Step([self._delta(event) for event in events], self._counts()))
                last = now
            if now - looked > LOADS_SECONDS:
                if loads := self._engine.expert_load.take():
                    self._channel.send(Loads([LayerLoad(*one) for one in loads]))
                looked = now

    def _step(self) -> list[Event]:
        """What a step added. One that fails costs the answers in it; a device that fails, and the same again and again,
        cost the engine."""
        try:
            events = self._engine.step()
        except (BenthicError, torch.AcceleratorError):
            raise
        except Exception as error:
            self._faults += 1
            if self._faults == FAULTS_IN_A_ROW:
                raise
            logger.exception("engine: a step failed, and the answers in it with it")
            return self._engine.fail_running(error)
        if events:
            self._faults = 0
        return events

    def _obey(self, wait: bool) -> None:
        try:
            order = self._channel.orders.get(timeout=HEARTBEAT_SECONDS) if wait else self._channel.orders.get_nowait()
            while True:
                match order:
                    case Add():
                        self._add(order)
                    case Cancel():
                        self._cancel(order)
                order = self._channel.orders.get_nowait()
        except queue.Empty:
            return

    def _add(self, order: Add) -> None:
        try:
            params = SamplingParams(**msgspec.structs.asdict(order.sampling))
            ids = self._engine.add_request(order.prompt, params, salt=order.salt)
        except (RequestError, ConfigError) as error:
            return self._channel.send(Refused(order.request, str(error)))
        except CapacityError as error:
            return self._channel.send(Refused(order.request, str(error), is_full=True))
        self._requests[order.request] = ids
        self._answers |= {one: (order.request, index) for index, one in enumerate(ids)}
        self._channel.send(Added(order.request))

    def _cancel(self, order: Cancel) -> None:
        for one in self._requests.pop(order.request, []):
            self._engine.cancel(one)
            self._answers.pop(one, None)
        self._channel.send(Cancelled(order.request))

    def _delta(self, event: Event) -> Delta:
        request, index = self._answers[event.request_id]
        done, count = event.completion, len(event.token_ids)
        first = len(done.token_ids) - count
        finish = prompt_logprobs = None
        if not first and done.prompt_logprobs is not None:
            prompt_logprobs = PromptLogprobs(done.prompt_logprobs, done.prompt_top_logprobs or [])
        if done.finish_reason is not None:
            finish = Finish(
                done.finish_reason, done.error, done.cached_tokens, done.drafted_tokens, done.accepted_tokens
            )
            del self._answers[event.request_id]
            self._requests[request].remove(event.request_id)
            if not self._requests[request]:
                del self._requests[request]
        return Delta(
            request,
            index,
            list(event.token_ids),
            event.text,
            done.logprobs[first:],
            None if done.top_logprobs is None else done.top_logprobs[first:],
            prompt_logprobs,
            finish,
        )

    def _counts(self) -> Counts:
        statistics = self._engine.statistics
        return Counts(**{name: getattr(statistics, name) for name in Counts.__struct_fields__})


def _load(start: Start) -> tuple[Engine, Ready]:
    began = time.monotonic()
    dtype = None if start.dtype is None else getattr(torch, start.dtype)
    settings = EngineConfig(**start.settings)
    engine = Engine(start.folder, start.device, start.speculative, dtype=dtype, settings=settings)
    config, weight = engine.model.config, engine.model.head_weight
    return engine, Ready(
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        blocks=engine.pool.size,
        block_size=settings.block_size,
        drafts=engine.scheduler.draft_tokens,
        max_sequences=settings.max_sequences,
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        load_seconds=time.monotonic() - began,
    )


def main(descriptor: int) -> int:
    """Serve until the server is gone (code 0) or the engine fails (1)."""
    to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the server, which ends its engine
    channel = Channel(socket.socket(fileno=descriptor))
    start = channel.orders.get()
    assert isinstance(start, Start), f"the first order is {start!r}"
    try:
        engine, ready = _load(start)
    except BenthicError as error:
        channel.send(Fatal(error.message, error.hint, is_mistake=True))
        channel.close()
        return 1
    channel.send(ready)
    try:
        Served(engine, channel).run()
    except Exception as error:  # whatever it is: its requests fail, and the server starts a new engine
        logger.exception("engine: failed")
        channel.send(Fatal(f"{type(error).__name__}: {error}"))
        channel.close()
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

"""Rows 20 and 21: a server that is told to end, loses its engine or its life, or whose engine hangs.

Each has its small version in test_life.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

import pytest

from tests.serve.reliability.load import PLAIN, ask
from tests.serve.running import is_alive

pytestmark = pytest.mark.long
TIMES = 10
LONG = {"prompt": "def", "max_tokens": 100, "ignore_eos": True}


def is_port_free(port):
    with socket.socket() as one:
        if one.connect_ex(("127.0.0.1", port)) == 0:
            return False
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
    return True


async def on_their_way(server, then, count=4, **more):
    """Half of them streams; `then` happens once they run, and is followed by one that comes late."""
    bodies = [LONG | {"stream": bool(number % 2)} | more for number in range(TIMES)]
    tasks = [asyncio.create_task(ask(server.port, PLAIN, body)) for body in bodies]
    await asyncio.to_thread(server.wait_for, lambda: server.metric("vllm:num_requests_running") == count)
    await asyncio.to_thread(then)
    late = await ask(server.port, PLAIN, LONG)
    return late, await asyncio.gather(*tasks)


def test_a_first_sigterm_lets_all_answers_end(start_faulty, tell):
    seconds = []
    for _ in range(TIMES):
        server = start_faulty(step_seconds=0.02).wait_until_ready()
        children = server.children()

        def end(server=server):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for(lambda: server.health()[1].get("status") == "draining")

        began = time.monotonic()
        late, outcomes = asyncio.run(on_their_way(server, end))
        assert (late.status, late.body["error"]["code"]) == (503, "draining")
        assert [outcome.status for outcome in outcomes] == [200] * 4
        assert [outcome.has_done for outcome in outcomes] == [False, True] * 2
        assert {choice["finish_reason"] for one in outcomes for choice in one.last["choices"]} == {"length"}
        assert server.process.wait(10) == 0
        seconds.append(round(time.monotonic() - began, 1))
        assert children
        assert not any(map(is_alive, children))
        assert is_port_free(server.port)
    tell(count=TIMES, seconds=seconds)


def test_a_second_sigterm_ends_at_once(start_faulty, tell):
    seconds = []
    for _ in range(TIMES):
        server = start_faulty("--drain-seconds", "60", step_seconds=0.02).wait_until_ready()
        children = server.children()
        began = 0.0

        def end(server=server):
            nonlocal began
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)

        asyncio.run(on_their_way(server, end, max_tokens=2000))
        assert server.process.wait(10) == 0
        seconds.append(round(time.monotonic() - began, 2))
        server.wait_for(lambda: not any(map(is_alive, children)), 10)  # noqa: B023
        assert is_port_free(server.port)
    tell(count=TIMES, seconds=seconds)
    assert max(seconds) < 4


def test_an_engine_that_is_killed_is_started_anew(start_faulty, tell):
    server = start_faulty("--num-blocks", "256", step_seconds=0.02).wait_until_ready()
    seconds, born = [], [server.engine_pid()]
    for _ in range(TIMES):
        _, outcomes = asyncio.run(on_their_way(server, lambda: os.kill(born[-1], signal.SIGKILL), max_tokens=2000))
        assert {outcome.errors[0]["code"] for outcome in outcomes} == {"engine_failed"}
        assert {outcome.status for outcome in outcomes if not outcome.has_done} == {503}
        began = time.monotonic()
        server.wait_until_ready()
        seconds.append(round(time.monotonic() - began, 1))
        born.append(server.engine_pid())
        assert asyncio.run(ask(server.port, PLAIN, LONG)).status == 200
    tell(count=TIMES, seconds_to_ready=seconds)
    assert server.metric("benthic:engine_restarts_total") == TIMES
    assert not any(map(is_alive, born[:-1]))
    server.stop()


def test_a_server_that_is_killed_leaves_no_child(start_faulty, tell):
    seconds = []
    for _ in range(TIMES):
        server = start_faulty(step_seconds=0.02).wait_until_ready()
        asyncio.run(ask(server.port, PLAIN, LONG | {"structured_outputs": {"regex": "a{9}"}}))
        children = server.children()
        assert len(children) == 2  # the engine, and the compiler of forms
        began = 0.0

        def end(server=server):
            nonlocal began
            began = time.monotonic()
            server.process.kill()
            server.process.wait()

        asyncio.run(on_their_way(server, end, max_tokens=2000))
        server.wait_for(lambda: not any(map(is_alive, children)), 10)  # noqa: B023
        seconds.append(round(time.monotonic() - began, 1))
        assert is_port_free(server.port)
    tell(count=TIMES, seconds=seconds)


def test_health_tells_of_a_step_that_hangs_and_asks_nothing_of_the_engine(start_faulty, tell):
    count, hang, silence = 3, 60, 10  # the last is the default
    server = start_faulty(step_seconds=0.01).wait_until_ready()
    seconds, probes = [], 0
    for _ in range(count):
        before = server.metric("benthic:engine_steps_total")
        server.faults.ask("sleep", 1, hang)
        outcome, noticed, asked = asyncio.run(hanging(server, silence))
        seconds.append(round(noticed, 1))
        probes += asked
        assert outcome.status == 200
        server.wait_until_ready()
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("benthic:engine_steps_total") == before + 100
    tell(count=count, hang_seconds=hang, silence_seconds=silence, noticed_after=seconds, probes=probes)
    assert max(seconds) < 2 * silence
    assert server.metric("benthic:engine_restarts_total") == 0
    server.stop()


async def hanging(server, silence):
    """One answer whose first step hangs, beside a probe every 50 ms; seconds until a 503."""
    task, began, noticed, probes = asyncio.create_task(ask(server.port, PLAIN, LONG)), time.monotonic(), 0.0, 0
    while not task.done():
        status, body = await asyncio.to_thread(server.health)
        probes += 1
        if status == 503 and not noticed:
            assert body["status"] == "silent"
            noticed = time.monotonic() - began
        await asyncio.sleep(0.05)
    assert noticed
    return await task, noticed, probes

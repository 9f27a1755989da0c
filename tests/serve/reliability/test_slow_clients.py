"""Rows 13 and 14: clients that write slowly, say nothing, or never read."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import pytest

from tests.serve.reliability.load import PLAIN, ask, head_of, quantile
from tests.serve.reliability.processes import descriptors, resident_bytes

SHORT = {"prompt": "def add", "max_tokens": 8, "ignore_eos": True, "stream": True}


async def first_tokens(server, until):
    """Seconds to the first event of normal requests, one after another, until the event is set."""
    found = []
    while not until.is_set():
        outcome = await ask(server.port, PLAIN, SHORT)
        assert outcome.status == 200
        assert outcome.has_done
        found.append(outcome.first)
        await asyncio.sleep(0.02)
    return found


async def crowd(port, count, talk):
    """Seconds until each of `count` connections was closed by the server; `talk` says what a client does meanwhile."""

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        talking = asyncio.create_task(talk(reader, writer))
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            pass
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        writer.close()
        return time.monotonic() - began

    return await asyncio.gather(*[one() for _ in range(count)])


async def slow_head(reader, writer):
    for byte in b"GET /health HTTP/1.1\r\nx: " + b"a" * 1000:
        writer.write(bytes([byte]))
        await asyncio.sleep(1)


async def slow_body(reader, writer):
    writer.write(head_of(PLAIN, b" " * 1000)[:-1000])
    for _ in range(1000):
        writer.write(b" ")
        await asyncio.sleep(1)


async def idle(reader, writer):
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    await asyncio.sleep(1000)


@pytest.mark.parametrize(
    ("count", "head_seconds", "body_seconds"), [(20, 1, 2), pytest.param(500, 10, 30, marks=pytest.mark.long)]
)
def test_those_who_dawdle_are_closed_and_hold_nobody_up(count, head_seconds, body_seconds, start_faulty, tell):
    limits = "--limits.header-seconds", str(head_seconds), "--limits.body-seconds", str(body_seconds)
    server = start_faulty("--num-blocks", "256", *limits, step_seconds=0.01).wait_until_ready()

    async def campaign():
        calm, until = [], asyncio.Event()
        asyncio.get_running_loop().call_later(body_seconds, until.set)
        calm = await first_tokens(server, until)
        before = descriptors(server.process.pid)
        closed, disturbed = {}, {}
        for talk in (slow_head, idle, slow_body):
            until = asyncio.Event()
            normal = asyncio.create_task(first_tokens(server, until))
            closed[talk.__name__] = await crowd(server.port, count, talk)
            until.set()
            disturbed[talk.__name__] = await normal
        return calm, closed, disturbed, before

    calm, closed, disturbed, before = asyncio.run(campaign())
    tell(
        count=count,
        limits=[head_seconds, body_seconds],
        calm_p99_ms=round(1000 * quantile(calm, 0.99), 1),
        calm_p50_ms=round(1000 * quantile(calm, 0.5), 1),
        p99_ms={name: round(1000 * quantile(one, 0.99), 1) for name, one in disturbed.items()},
        p50_ms={name: round(1000 * quantile(one, 0.5), 1) for name, one in disturbed.items()},
        samples=[len(calm), *map(len, disturbed.values())],
        closed_after={name: [round(min(one), 1), round(max(one), 1)] for name, one in closed.items()},
    )
    assert max(closed["slow_head"]) < head_seconds + 5
    assert max(closed["idle"]) < head_seconds + 5
    assert max(closed["slow_body"]) < body_seconds + 5
    server.wait_for(lambda: descriptors(server.process.pid) <= before)
    server.stop()


@pytest.mark.parametrize(("count", "tokens"), [(5, 1500), pytest.param(50, 4000, marks=pytest.mark.long)])
def test_those_who_never_read_cost_little_memory(count, tokens, start_faulty, tell):
    options = "--num-blocks", "4096", "--max-sequences", "64", "--limits.send-seconds", "3"
    server = start_faulty(*options).wait_until_ready()
    chance, sockets = random.Random(0), []
    body = {"max_tokens": tokens, "stream": True, "ignore_eos": True, "logprobs": 5}
    asyncio.run(warm_up(server, body))
    before, most = resident_bytes(server.process.pid), 0
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", server.port))
        prompt = [chance.randrange(10, 250) for _ in range(8)]
        one.sendall(head_of(PLAIN, json.dumps(body | {"prompt": prompt}).encode()))
        sockets.append(one)
    server.wait_for(lambda: server.metric("vllm:num_requests_running") > 0)
    began = time.monotonic()
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        most = max(most, resident_bytes(server.process.pid))
        time.sleep(0.1)
    most = max(most, resident_bytes(server.process.pid))
    aborted = server.metric("vllm:request_success_total", 'finished_reason="abort"')
    tell(
        count=count,
        tokens=tokens,
        seconds=round(time.monotonic() - began, 1),
        aborted=aborted,
        kib_each=round((most - before) / 1024 / count, 1),
        kib_left_each=round((resident_bytes(server.process.pid) - before) / 1024 / count, 1),
    )
    for one in sockets:
        one.close()
    server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    server.stop()


async def warm_up(server, body):
    await asyncio.gather(*[ask(server.port, PLAIN, body | {"prompt": "def", "max_tokens": 200}) for _ in range(8)])

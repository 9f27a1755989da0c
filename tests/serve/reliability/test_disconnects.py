"""Row 15: clients that leave, at every stage of an answer."""

from __future__ import annotations

import asyncio
import itertools
import urllib.request

import pytest

from tests.serve.reliability.load import PLAIN, Outcome, ask

STEP_SECONDS = 0.05
CHUNK, PROMPT = 64, 1024
LONG = {"max_tokens": 400, "ignore_eos": True}
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server(start_faulty):
    """Two answers at once, prompts in pieces, and steps so slow that they can be counted."""
    options = "--max-sequences", "2", "--max-step-tokens", str(CHUNK), "--block-size", "16", "--num-blocks", "512"
    server = start_faulty(*options, step_seconds=STEP_SECONDS).wait_until_ready()
    yield server
    server.stop()


def metrics(server):
    """Steps so far, answers that run and that wait, and the share of the cache in use, all of one moment."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines()]
    known = {name.partition("{")[0]: float(value) for name, value in lines if not name.startswith("#")}
    names = "benthic:engine_steps_total", "vllm:num_requests_running", "vllm:num_requests_waiting"
    return [known[name] for name in (*names, "vllm:kv_cache_usage_perc")]


def aborted(server):
    return server.metric("vllm:request_success_total", 'finished_reason="abort"')


async def leave(server, stage, stream):
    """One client that leaves at `stage`; the engine's steps from then until nothing was left of it."""
    prompt = [10 + next(NUMBERS) % 200] * (PROMPT if stage == "prompt" else 4)
    body = LONG | {"prompt": prompt, "stream": stream}
    if stage == "end":
        outcome = await ask(server.port, PLAIN, body | {"max_tokens": 3}, is_last if stream else None, abrupt=True)
        assert outcome.status == 200
        await until(server, lambda now: now[1:] == [0, 0, 0])
        return 0
    others = []
    if stage == "queued":
        others = [asyncio.create_task(ask(server.port, PLAIN, LONG | {"prompt": "def"})) for _ in range(2)]
        await until(server, lambda now: now[1] == 2)
    task = asyncio.create_task(ask(server.port, PLAIN, body, abrupt=next(NUMBERS) % 2 == 0))
    begun = metrics(server)[0]
    await until(server, lambda now: now[2] == 1 if stage == "queued" else now[1] == 1)
    at, *_ = await until(server, lambda now: now[0] >= begun + {"first token": 1, "middle": 6}.get(stage, 0))
    await give_up(task)
    after, *_ = await until(server, lambda now: now[2] == 0 if stage == "queued" else now[1:] == [0, 0, 0])
    await give_up(*others)
    await until(server, lambda now: now[1:] == [0, 0, 0])
    return after - at


async def give_up(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def is_last(outcome: Outcome) -> bool:
    return outcome.events[-1]["choices"][0]["finish_reason"] is not None


async def until(server, holds):
    while not holds(now := await asyncio.to_thread(metrics, server)):
        await asyncio.sleep(0.005)
    return now


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("stage", ["queued", "prompt", "first token", "middle", "end"])
def test_who_leaves_is_forgotten_within_two_steps(stage, stream, count, server, tell):
    before = aborted(server)
    steps = [asyncio.run(leave(server, stage, stream)) for _ in range(count)]
    each = {"queued": 3, "end": 0}.get(stage, 1)
    server.wait_for(lambda: aborted(server) == before + each * count)
    tell(count=count, steps=[sorted(steps)[len(steps) // 2], max(steps)], aborted=aborted(server) - before)
    # One step is on its way when a client leaves, and one may begin before the server hears of it.
    assert sorted(steps)[int(0.9 * (len(steps) - 1))] <= 2

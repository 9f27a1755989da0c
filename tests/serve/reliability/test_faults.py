"""Rows 18 and 19: what fails inside costs the answers that it touches, and the server answers the next request."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.serve.reliability.load import CHAT, PLAIN, Outcome, ask

SCHEMA = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
LONG = {"prompt": "def", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
SECONDS = 5.0


@pytest.fixture(scope="module")
def server(start_faulty):
    """One that outlives all of it."""
    server = start_faulty("--num-blocks", "256", "--speculative", step_seconds=0.02).wait_until_ready()
    yield server
    server.stop()


def is_idle(server):
    return server.metric("vllm:num_requests_running") == 0 and server.metric("vllm:kv_cache_usage_perc") == 0


def ended(server, reason):
    return server.metric("vllm:request_success_total", f'finished_reason="{reason}"')


async def meet(server, place, argument=0.0, times=1):
    """Two streams and two whole answers, one of each kind bound to a form, on their way when `place` fails."""
    chat = {"messages": [{"role": "user", "content": "def"}], "response_format": FORM, "max_tokens": 60}
    whole = [asyncio.create_task(ask(server.port, path, body)) for path, body in ((PLAIN, LONG), (CHAT, chat))]
    streams = [
        asyncio.create_task(ask(server.port, path, body | {"stream": True}))
        for path, body in ((PLAIN, LONG), (CHAT, chat))
    ]
    await asyncio.to_thread(server.wait_for, lambda: server.metric("vllm:num_requests_running") >= 3)
    server.faults.ask(place, times, argument)
    outcomes = await asyncio.gather(*whole, *streams)
    began = time.monotonic()
    while (await ask(server.port, PLAIN, LONG | {"max_tokens": 3})).status != 200:
        await asyncio.sleep(0.05)
    return outcomes, time.monotonic() - began


def assert_told(outcome: Outcome, statuses: tuple[int, ...]) -> bool:
    """Whether it failed; then it says so in the way that its kind has."""
    if not outcome.errors:
        assert outcome.status == 200
        assert outcome.body or outcome.has_done
        return False
    if outcome.body:
        assert outcome.status in statuses
    else:
        assert (outcome.status, outcome.has_done) == (200, True)
    (error,) = outcome.errors
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("server_error", "invalid_request_error")
    return True


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("place", "least", "most"),
    [("forward", 3, 4), ("sampler", 3, 4), ("grammar", 1, 1), ("detokeniser", 1, 1), ("writer", 1, 1)],
)
def test_an_exception_costs_the_answers_in_it(place, least, most, count, server, tell):
    pid, before, failed, waits = server.engine_pid(), ended(server, "abort"), [], []
    for _ in range(count):
        outcomes, seconds = asyncio.run(meet(server, place))
        failed.append(sum([assert_told(outcome, (400, 500)) for outcome in outcomes]))
        waits.append(seconds)
    tell(count=count, failed=failed, slowest_next_answer=round(max(waits), 2))
    assert all(least <= one <= most for one in failed)
    assert max(waits) < SECONDS
    assert server.engine_pid() == pid
    assert server.health()[0] == 200
    server.wait_for(lambda: is_idle(server))
    assert ended(server, "abort") == before + (0 if place != "writer" else count)


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize(("place", "argument"), [("memory", 0), ("numbers", 0), ("token", 10**6), ("token", -1)])
def test_a_device_without_memory_and_strange_numbers_cost_answers_at_most(place, argument, count, server, tell):
    pid, before, failed = server.engine_pid(), ended(server, "error"), 0
    for _ in range(count):
        outcomes, seconds = asyncio.run(meet(server, place, argument))
        failed += sum([assert_told(outcome, (400, 500)) for outcome in outcomes])
        assert seconds < SECONDS
    tell(count=count, failed=failed)
    assert server.engine_pid() == pid
    assert server.health()[0] == 200
    assert ended(server, "error") == before + failed
    assert failed >= count if place != "memory" else not failed
    server.wait_for(lambda: is_idle(server))


@pytest.fixture(scope="module")
def mortal(start_faulty):
    """One whose engines end."""
    server = start_faulty("--num-blocks", "256", step_seconds=0.02).wait_until_ready()
    yield server
    server.stop()


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize(("place", "times"), [("device", 1), ("forward", 3), ("exit", 1)])
def test_an_engine_that_cannot_go_on_is_started_anew(place, times, count, mortal, tell):
    seconds = []
    for _ in range(count):
        before, errors = mortal.metric("benthic:engine_restarts_total"), ended(mortal, "error")
        pid, began = mortal.engine_pid(), time.monotonic()
        outcomes = asyncio.run(meet_the_end(mortal, place, times))
        status, body = mortal.health()
        assert (status, body["status"]) == (503, "restarting")
        mortal.wait_until_ready()
        seconds.append(round(time.monotonic() - began, 1))
        assert [assert_told(outcome, (500, 503)) for outcome in outcomes] == [True] * len(outcomes)
        assert mortal.engine_pid() != pid
        assert mortal.metric("benthic:engine_restarts_total") == before + 1
        # Those that no engine took in any more were refused, not failed.
        assert errors + 4 <= ended(mortal, "error") <= errors + len(outcomes)
        assert asyncio.run(ask(mortal.port, PLAIN, LONG)).status == 200
    tell(count=count, seconds_to_ready=seconds)
    assert "a new one starts in" in mortal.log.read_text()


async def meet_the_end(server, place, times):
    """Streams and whole answers on their way when the engine ends, and some that wait to be taken in."""
    bodies = [LONG | {"stream": stream, "max_tokens": 2000} for stream in (False, True, False, True)]
    tasks = [asyncio.create_task(ask(server.port, PLAIN, body)) for body in bodies]
    await asyncio.to_thread(server.wait_for, lambda: server.metric("vllm:num_requests_running") == len(bodies))
    server.faults.ask(place, times)
    outcomes = []
    while server.faults.is_waiting(place):
        # A step that failed leaves nothing to do: more has to come for the next to fail.
        outcomes.append(await ask(server.port, PLAIN, LONG))
    return [*outcomes, *await asyncio.gather(*tasks)]

"""Rows 16 and 17: ten times as many requests as can be answered, and a cache for a quarter of those that run."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter

import pytest

from tests.serve.reliability.load import PLAIN, Outcome, ask, quantile
from tests.serve.reliability.processes import processor_seconds, resident_bytes
from tests.serve.reliability.queue_model import simulated

SLOTS, QUEUE, TOKENS = 8, 16, 32
STEP_SECONDS = 0.02


def body(chance):
    prompt = [chance.randrange(10, 250) for _ in range(12)]
    return {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}


async def calm(server, seconds, chance):
    """As many clients as are answered at once, none of whom waits."""
    found, end = [], time.monotonic() + seconds

    async def client():
        while time.monotonic() < end:
            found.append(await ask(server.port, PLAIN, body(chance)))

    await asyncio.gather(*[client() for _ in range(SLOTS)])
    return found


async def storm(server, seconds, rate, chance) -> list[Outcome]:
    """Poisson arrivals."""
    tasks, began = [], time.monotonic()
    at = began
    while (at := at + chance.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        tasks.append(asyncio.create_task(ask(server.port, PLAIN, body(chance))))
    return await asyncio.gather(*tasks)


@pytest.mark.long
def test_ten_times_too_many_requests_are_refused_and_the_others_keep_their_pace(start_faulty, tell):
    before, seconds = 20, 60
    sizes = "--num-blocks", "256", "--max-sequences", str(SLOTS), "--limits.queue", str(QUEUE)
    server, chance = start_faulty(*sizes, step_seconds=STEP_SECONDS).wait_until_ready(), random.Random(0)
    pids = server.process.pid, server.engine_pid()
    alone = asyncio.run(calm(server, before, chance))
    each = [one.seconds for one in alone]
    rate = 10 * SLOTS / statistics.mean(each)
    asyncio.run(storm(server, 2, rate, chance))  # the memory of so many connections is taken before it is looked at
    held = [resident_bytes(pid) for pid in pids]
    computed = processor_seconds(server.process.pid)
    outcomes = asyncio.run(storm(server, seconds, rate, chance))
    computed = processor_seconds(server.process.pid) - computed
    growth = [resident_bytes(pid) / one - 1 for pid, one in zip(pids, held, strict=True)]
    alone += asyncio.run(calm(server, before, chance))  # the machine's other work changes: before and after
    each = [one.seconds for one in alone]
    model, refused = simulated(each, rate, SLOTS, SLOTS + QUEUE, seconds, chance)
    taken = [one for one in outcomes if one.status == 200]
    others = [one for one in outcomes if one.status != 200]
    latency, predicted = quantile([one.seconds for one in taken], 0.99), quantile(model, 0.99)
    pace, calm_pace = (quantile([one.pace for one in group], 0.99) for group in (taken, alone))
    tell(
        seconds=seconds,
        rate=round(rate, 1),
        requests=len(outcomes),
        statuses=Counter(one.status for one in outcomes),
        refused_by_model=refused,
        p99_seconds=round(latency, 2),
        p99_of_model=round(predicted, 2),
        p50_seconds=round(quantile([one.seconds for one in taken], 0.5), 2),
        p50_of_model=round(quantile(model, 0.5), 2),
        pace_p99_ms=round(1000 * pace, 1),
        calm_pace_p99_ms=round(1000 * calm_pace, 1),
        refusal_p50_ms=round(1000 * quantile([one.seconds for one in others], 0.5), 1),
        refusal_p99_ms=round(1000 * quantile([one.seconds for one in others], 0.99), 1),
        server_processor_ms_a_request=round(1000 * computed / len(outcomes), 2),
        retry_after=Counter(one.headers.get("retry-after") for one in others),
        growth_percent=[round(100 * one, 2) for one in growth],
    )
    assert {one.status for one in outcomes} == {200, 429}
    assert all(one.has_done for one in taken)
    assert all(int(one.headers["retry-after"]) >= 1 for one in others)
    assert len(others) > 0.8 * len(outcomes)
    server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    assert max(growth) < 0.05
    assert latency < 1.2 * predicted
    server.stop()


@pytest.mark.parametrize(
    ("count", "share", "drafts"),
    [
        (32, 8, True),
        pytest.param(256, 64, False, marks=pytest.mark.long),
        pytest.param(256, 64, True, marks=pytest.mark.long),
    ],
)
def test_a_cache_for_a_quarter_of_what_runs_changes_no_answer(count, share, drafts, start_faulty, tell):
    tokens, size = 120, 16
    options = ["--block-size", str(size), "--max-sequences", str(count), *(["--speculative"] if drafts else [])]
    chance = random.Random(1)
    bodies = [body(chance) | {"max_tokens": tokens, "stream": False} for _ in range(count)]
    blocks = share * -(-(12 + tokens + 1) // size)
    texts, found = [], {}
    for number in (blocks, 8 * blocks):
        server = start_faulty("--num-blocks", str(number), *options).wait_until_ready()
        began = time.monotonic()
        outcomes = asyncio.run(all_of(server, bodies))
        assert {one.status for one in outcomes} == {200}
        texts.append([one.text for one in outcomes])
        preempted = server.metric("vllm:num_preemptions_total")
        found[number] = {"preemptions": preempted, "seconds": round(time.monotonic() - began, 1)}
        assert (preempted > 0) == (number == blocks)
        server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)  # noqa: B023
        server.stop()
    differing = sum(one != other for one, other in zip(*texts, strict=True))
    tell(count=count, blocks=found, differing=differing)
    assert not differing


async def all_of(server, bodies):
    return await asyncio.gather(*[ask(server.port, PLAIN, one) for one in bodies])

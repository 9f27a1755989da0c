"""Row 24: mixed load, a fifth of whose clients leaves early."""

from __future__ import annotations

import asyncio

import pytest

from benthic.serve.form_check import REMEMBERED
from tests.serve.reliability.load import PLAIN, ask
from tests.serve.reliability.processes import descriptors
from tests.serve.reliability.soak import soak

MINUTE = 60


@pytest.mark.parametrize("seconds", [8, pytest.param(30 * MINUTE, marks=pytest.mark.long)])
def test_after_mixed_load_the_server_holds_what_it_held_before(seconds, start_faulty, tell):
    options = "--num-blocks", "256", "--max-sequences", "16", "--speculative"
    server = start_faulty(*options, step_seconds=0.01).wait_until_ready()
    pids = server.process.pid, server.engine_pid()
    # What is kept on purpose, and bounded, is there before anything is measured: forms known to compile, the compiler's
    # process, prompts in the cache, threads.
    asyncio.run(fill_forms(server, REMEMBERED if seconds >= 30 * MINUTE else 20))
    asyncio.run(soak(server, min(MINUTE, seconds / 4), 8, 0.25, 0.5))
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0)
    server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    before, python = [descriptors(pid) for pid in pids], [server.faults.python_blocks(pid) for pid in pids]
    found = asyncio.run(soak(server, seconds, 8, 0.25, max(0.5, seconds / 600)))
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0)
    server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    server.wait_for(lambda: [descriptors(pid) for pid in pids] <= before)
    growth = [found.resident(process, 0.9, 1.0) / found.resident(process, 0.1, 0.2) - 1 for process in (0, 1)]
    python_growth = [server.faults.python_blocks(pid) / one - 1 for pid, one in zip(pids, python, strict=True)]
    tell(
        seconds=seconds,
        requests=found.requests,
        left=found.left,
        statuses=found.statuses,
        kinds=found.kinds,
        broken=found.broken[:5],
        resident_mib=found.curve(15),
        growth_percent=[round(100 * one, 2) for one in growth],
        python_blocks=python,
        python_growth_percent=[round(100 * one, 2) for one in python_growth],
        descriptors=before,
        aborted=server.metric("vllm:request_success_total", 'finished_reason="abort"'),
    )
    assert not found.broken
    assert found.left > 0.15 * found.requests
    assert server.metric("benthic:engine_restarts_total") == 0
    if seconds >= 30 * MINUTE:
        assert max(growth) < 0.01
        assert max(python_growth) < 0.01
    server.stop()


async def fill_forms(server, count):
    """Ask for that many different forms."""

    async def some(first):
        for number in range(first, count, 8):
            form = {"structured_outputs": {"regex": f"a{number}"}, "max_tokens": 1}
            assert (await ask(server.port, PLAIN, {"prompt": "x"} | form)).status == 200

    await asyncio.gather(*map(some, range(8)))

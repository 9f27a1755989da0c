"""Row 22: who shares the cache with others learns nothing of them, and cannot take their share of it."""

from __future__ import annotations

import asyncio
import random
import statistics

import pytest

from tests.serve.reliability.load import PLAIN, ask

VICTIM, OTHER = "v" * 32, "o" * 32
BLOCK, CHUNK, PROMPT = 16, 64, 640


@pytest.fixture(scope="module")
def server(start_faulty, tmp_path_factory):
    """Two keys, a cache for four long prompts, and prompts in ten pieces of 20 ms."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{VICTIM}\n{OTHER}\n")
    sizes = "--block-size", str(BLOCK), "--max-step-tokens", str(CHUNK), "--num-blocks", str(4 * PROMPT // BLOCK + 8)
    server = start_faulty(*sizes, "--api-key-file", str(keys), step_seconds=0.02).wait_until_ready()
    yield server
    server.stop()


def prompt_of(chance):
    return [chance.randrange(10, 250) for _ in range(PROMPT)]


async def send(server, key, prompt, salt=None):
    """Seconds to the first token, and how many of the prompt's tokens were found."""
    body = {"prompt": prompt, "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
    outcome = await ask(server.port, PLAIN, body | ({"cache_salt": salt} if salt else {}), key=key)
    assert outcome.status == 200
    return outcome.first, outcome.events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.long)])
def test_the_time_to_the_first_token_tells_nothing_of_another_s_prompts(count, server, tell):
    chance = random.Random(0)

    async def campaign():
        probes, controls, own = [], [], []
        for _ in range(count):
            secret, other = prompt_of(chance), prompt_of(chance)
            await send(server, VICTIM, secret)
            # Half of the time in the other order: the machine's other work changes.
            for prompt, times in chance.sample([(secret, probes), (other, controls)], 2):
                seconds, cached = await send(server, OTHER, prompt)
                assert cached == 0
                times.append(seconds)
            seconds, cached = await send(server, VICTIM, secret)
            assert cached == PROMPT - BLOCK
            own.append(seconds)
        return probes, controls, own

    probes, controls, own = asyncio.run(campaign())
    ratio = statistics.median(probes) / statistics.median(controls)
    tell(
        count=count,
        probe_ms=round(1000 * statistics.median(probes), 1),
        control_ms=round(1000 * statistics.median(controls), 1),
        own_ms=round(1000 * statistics.median(own), 1),
        ratio=round(ratio, 3),
    )
    if count >= 60:
        assert 0.95 < ratio < 1.05


@pytest.mark.parametrize("count", [8, pytest.param(40, marks=pytest.mark.long)])
def test_a_flood_of_prompts_under_many_salts_leaves_a_victim_its_share(count, server, tell):
    chance = random.Random(1)
    kept = prompt_of(chance)

    async def campaign():
        await send(server, VICTIM, kept)
        for turn in range(count):
            await send(server, OTHER, prompt_of(chance), f"salt {turn}")
        return await send(server, VICTIM, kept)

    _, cached = asyncio.run(campaign())
    tell(count=count, cached=cached, prompt=PROMPT)
    assert cached == PROMPT - BLOCK

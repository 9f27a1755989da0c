"""A greedy answer is the same whatever the engine does beside it: alone, in crowds, put back, cached, drafted."""

from __future__ import annotations

import random

import pytest

from benthic.config.engine import EngineConfig
from benthic.inference.engine import Engine
from benthic.model.sampling import SamplingParams
from tests.model.configs import CONFIGS, randomised, tiny

LENGTH = 12
WAYS = {
    "a crowd of 2": {"max_sequences": 2},
    "a crowd of 8": {"max_sequences": 8},
    "a crowd of 64": {"max_sequences": 64},
    "chunks of 64": {"max_sequences": 16, "max_step_tokens": 64},
    "chunks of 512": {"max_sequences": 16, "max_step_tokens": 512},
    "chunks of 8192": {"max_sequences": 16, "max_step_tokens": 8192},
    "chunks of 7": {"max_sequences": 4, "max_step_tokens": 7},
    "few blocks": {"max_sequences": 64, "num_blocks": 22},
    "no prefix cache": {"max_sequences": 32, "prefix_caching": False},
}
MODEL = randomised(tiny(**CONFIGS["v3"], vocab_size=300, max_position_embeddings=512))
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0)


def prompts_of(count):
    """Of 1 to 300 tokens; every third begins as another does."""
    stream = random.Random(0)
    prompts = []
    for place in range(count):
        body = [stream.randrange(2, 300) for _ in range(stream.choice([1, 3, 15, 16, 17, 60, 150, 280]))]
        prompts.append(prompts[place - 2][:120] + body[:60] if place % 3 == 2 else body)
    return prompts


def answers(prompts, speculative=False, **changes):
    sizes = {"block_size": 16, "num_blocks": 1600, "always_draft": True} | changes
    engine = Engine(MODEL, speculative=speculative, settings=EngineConfig(**sizes))
    texts = [one.token_ids for one in engine.generate(prompts, GREEDY)]
    engine.check()
    return texts, engine.statistics


def alone(prompts):
    engine = Engine(MODEL, settings=EngineConfig(block_size=16, num_blocks=64, prefix_caching=False))
    return [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]


def assert_the_same_in_every_way(prompts):
    wanted = alone(prompts)
    assert all(len(one) == LENGTH for one in wanted)
    preemptions = hits = accepted = 0
    for way, changes in WAYS.items():
        for speculative in (False, True):
            found, statistics = answers(prompts, speculative, **changes)
            assert found == wanted, (way, speculative)
            preemptions += statistics.preemptions
            hits += statistics.cached_tokens
            accepted += statistics.accepted_tokens
    assert preemptions
    assert hits
    assert accepted


def test_twelve_greedy_answers_are_the_same_in_every_way():
    assert_the_same_in_every_way(prompts_of(12))


@pytest.mark.long
def test_two_hundred_greedy_answers_are_the_same_in_every_way():
    assert_the_same_in_every_way(prompts_of(200))

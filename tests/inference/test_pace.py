"""Drafting rests while the clock says that it costs more than it brings."""

from __future__ import annotations

import pytest

from benthic.inference.engine import Engine
from benthic.inference.generate import generate
from benthic.inference.pace import RECHECK, REST, TRIAL, Pace
from benthic.inference.request import Request
from benthic.inference.scheduler import Work
from benthic.model.sampling import Sampler, SamplingParams
from tests.model.configs import CONFIGS, randomised, tiny


def run(pace, steps, plain_seconds, drafted_seconds, tokens):
    """How many steps went with drafts, where a step of one sequence takes so long and draws so many tokens."""
    drafted = 0
    for _ in range(steps):
        request = Request(0, [1], Sampler(SamplingParams()), 0, b"")
        request.drafts = [5] if pace.drafting else []
        pace.prepare([request])
        drafts = tuple(request.drafts)
        drafted += len(drafts)
        seconds = drafted_seconds if drafts else plain_seconds
        pace.note([Work(request, 1, drafts)], tokens if drafts else 1, min(seconds, plain_seconds), seconds)
    return drafted


def test_drafts_that_cost_more_than_they_bring_rest_and_are_tried_again():
    pace = Pace(judges=True)
    assert run(pace, TRIAL, 1.0, 2.0, tokens=1.5) == TRIAL * 3 // 4
    assert not pace.drafting
    # Over a long time the cost of trials is small.
    steps = 5 * (REST + TRIAL)
    drafted = run(pace, steps, 1.0, 2.0, tokens=1.0)
    assert 0 < drafted < 0.03 * steps


def test_drafts_that_pay_go_on_and_are_compared_now_and_then():
    pace = Pace(judges=True)
    drafted = run(pace, TRIAL + 100 * RECHECK, 1.0, 1.4, tokens=1.8)
    assert pace.drafting
    assert drafted > 0.95 * 100 * RECHECK
    assert run(pace, 2 * RECHECK, 1.0, 2.5, tokens=1.8) < 2 * RECHECK
    assert not pace.drafting


def test_one_long_step_decides_nothing():
    pace = Pace(judges=True)
    run(pace, TRIAL * 2, 1.0, 1.4, tokens=1.8)
    run(pace, 2, 1.0, 500.0, tokens=1.8)
    run(pace, TRIAL, 1.0, 1.4, tokens=1.8)
    assert pace.drafting


def test_without_judgement_drafting_never_rests():
    pace = Pace(judges=False)
    assert run(pace, 100, 1.0, 9.0, tokens=1.0) == 100


@pytest.mark.usefixtures("_as_a_user")
def test_requests_that_lost_their_drafts_and_those_that_find_their_blocks_answer_as_ever(make_engine, monkeypatch):
    model, params = randomised(tiny(**CONFIGS["v3 of two predictions"])), SamplingParams(max_tokens=20, temperature=0)
    engine: Engine = make_engine(model, True, block_size=4, num_blocks=40)
    prompts, done = [[n, *range(9), n] for n in range(3)], []
    for prompt in prompts:
        engine.add_request(prompt, params)
    for step in range(80):
        # Off in the midst of the first answers, on again, and a prompt found in blocks of both times.
        engine._pace.drafting = not 4 <= step < 12
        if step == 14:
            first = done[0] if done else prompts[0]
            prompts.append([*prompts[0], *generate(model, prompts[0], params), 3])
            engine.add_request(prompts[-1], params)
            assert first
        done += [event.completion for event in engine.step() if event.completion.finish_reason]
        engine.check()
    assert len(done) == 4
    for one in done:
        assert one.token_ids == list(generate(model, one.prompt_token_ids, params))
    assert max(one.cached_tokens for one in done) > 12

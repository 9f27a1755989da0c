"""Who is computed when: nobody is held up by more than one chunk, and the order still counts."""

from __future__ import annotations

import torch

from benthic.inference.generate import generate
from benthic.inference.scheduler import PRIORITY_STEP, rank_of
from benthic.model.sampling import SamplingParams
from tests.model.configs import CONFIGS, randomised, tiny

GREEDY = SamplingParams(max_tokens=8, temperature=0)
MODEL = randomised(tiny(**CONFIGS["v3"]))


def events_of(engine):
    """The tokens of every step by request, until nothing is left."""
    steps = []
    while engine.has_work:
        steps.append({event.request_id: len(event.token_ids) for event in engine.step()})
    return steps


def test_a_long_prompt_stalls_neither_those_who_decode_nor_those_who_come(make_engine):
    engine = make_engine(MODEL, max_step_tokens=8)
    (decoding,) = engine.add_request([1, 2], GREEDY.replace(max_tokens=30))
    engine.step()
    (long,) = engine.add_request([3] * 50, GREEDY)
    (short,) = engine.add_request([4, 5], GREEDY)
    steps = events_of(engine)
    # The one that decodes gets a token in every step, and the short prompt does not wait for the long one.
    assert all(decoding in step for step in steps[:29])
    first = {request: next(i for i, step in enumerate(steps) if request in step) for request in (long, short)}
    assert first[short] <= 1
    assert first[long] >= 6


def test_a_step_never_computes_more_tokens_than_it_may(make_engine, monkeypatch):
    engine = make_engine(MODEL, True, max_step_tokens=10, max_sequences=64)
    seen, states = [], MODEL.paged_states
    monkeypatch.setattr(MODEL, "paged_states", lambda ids, pages: seen.append(len(ids)) or states(ids, pages))
    engine.generate([[n] * (n + 1) for n in range(20)], GREEDY)
    assert max(seen) == 10


def test_those_who_came_first_and_those_of_smaller_priority_start_first(make_engine):
    engine = make_engine(MODEL, max_sequences=1)
    ids = [engine.add_request([n], GREEDY, priority=priority)[0] for n, priority in enumerate([0, 0, 1, -1, 0])]
    order = []
    for step in events_of(engine):
        order += [request for request in step if request not in order]
    assert order == [ids[place] for place in (3, 0, 1, 4, 2)]


def test_a_low_priority_is_overtaken_by_so_many_and_no_more():
    low = rank_of(0, 1)
    assert rank_of(PRIORITY_STEP - 1, 0) < low < rank_of(PRIORITY_STEP + 1, 0)
    assert len({rank_of(arrival, priority) for arrival in range(300) for priority in range(-2, 3)}) == 1500


def test_the_last_to_come_is_put_back_first_and_nobody_is_twice(make_engine):
    engine = make_engine(MODEL, block_size=4, num_blocks=13, max_sequences=3)
    params = SamplingParams(max_tokens=20, temperature=0)
    done = engine.generate([[n, n + 1] for n in range(3)], params)
    assert engine.scheduler.preemptions >= 1
    for n, one in enumerate(done):
        assert one.token_ids == list(generate(MODEL, [n, n + 1], params))


def test_the_same_requests_are_served_in_the_same_steps(make_engine):
    def run():
        engine = make_engine(MODEL, True, block_size=2, num_blocks=40, max_step_tokens=12)
        stream = torch.Generator().manual_seed(5)
        for _ in range(12):
            length = int(torch.randint(1, 30, (), generator=stream))
            engine.add_request([length % 7] * length, GREEDY, priority=length % 3)
        return events_of(engine)

    assert run() == run()

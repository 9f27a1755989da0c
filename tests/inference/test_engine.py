"""Whatever else the engine is busy with, an answer is that of plain generation; and no block is ever lost."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import benthic
from benthic.config.engine import EngineConfig
from benthic.errors import CapacityError, ConfigError, RequestError
from benthic.inference import sizing
from benthic.inference.answer import Answer
from benthic.inference.engine import Engine
from benthic.inference.generate import generate, generate_text
from benthic.inference.pretrained import save_model
from benthic.model.sampling import SamplingParams
from benthic.numerics.compare import assert_close
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny, tokens
from tests.model.test_float8_storage import given_back

GREEDY = SamplingParams(max_tokens=10, temperature=0)
PREDICTING = [name for name in CONFIGS if CONFIGS[name].get("num_nextn_predict_layers")]


def prompts_of(config, lengths, seed=3):
    return [tokens(config, 1, length, seed + place)[0].tolist() for place, length in enumerate(lengths)]


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_a_crowd_are_those_of_plain_generation(name, speculative, make_engine):
    config = tiny(**CONFIGS[name])
    model = randomised(config)
    prompts = prompts_of(config, [1, 3, 8, 17, 40, 4])
    wishes = [
        SamplingParams(max_tokens=6 + place, temperature=0.9 * (place % 2), top_k=20, seed=place) for place in range(6)
    ]
    engine = make_engine(model, speculative, block_size=4, num_blocks=30, max_step_tokens=16)
    done = engine.generate(prompts, wishes)
    assert [one.token_ids for one in done] == [
        list(generate(model, prompt, params)) for prompt, params in zip(prompts, wishes, strict=True)
    ]
    assert {one.finish_reason for one in done} == {"length"}


# A model for all random schedules, and what it says to every prompt of a small family.
MODEL = randomised(tiny(**CONFIGS["v3 of two predictions"]))
FAMILY = [[7, 8, 9, 10, 11, 12, 13, 14][:length] + tail for length in (1, 4, 8) for tail in ([], [1], [2, 3, 4, 5])]
PLAIN = [list(generate(MODEL, prompt, SamplingParams(max_tokens=12, temperature=0))) for prompt in FAMILY]

Schedule = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 8]),
        "spare": st.integers(0, 30),
        "max_step_tokens": st.integers(1, 30),
        "max_sequences": st.integers(1, 5),
        "prefix_caching": st.booleans(),
        "draft_tokens": st.sampled_from([None, 1, 2, 4]),
        "speculative": st.booleans(),
        # Each request: prompt, tokens, priority, when it comes, and after how many steps it is cancelled.
        "requests": st.lists(
            st.tuples(
                st.integers(0, len(FAMILY) - 1),
                st.integers(1, 12),
                st.integers(-2, 2),
                st.integers(0, 6),
                st.one_of(st.none(), st.none(), st.integers(0, 8)),
            ),
            min_size=1,
            max_size=10,
        ),
    }
)


@pytest.mark.usefixtures("_as_a_user")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(Schedule)
def test_any_schedule_gives_the_plain_answers_and_keeps_the_pool_whole(schedule):
    run(schedule)


def run(schedule, prepare=lambda engine: None):
    """Let a fresh engine, once `prepare` has seen it, work through a schedule, and check every step and answer."""
    schedule = dict(schedule)
    requests, speculative, spare = (schedule.pop(name) for name in ("requests", "speculative", "spare"))
    # Just enough for the longest alone, and sometimes more: blocks run out often.
    blocks = -(-(12 + 12 + 4) // schedule["block_size"]) + spare
    engine = Engine(MODEL, speculative=speculative, settings=EngineConfig(num_blocks=blocks, **schedule))
    prepare(engine)
    arrivals = sorted(enumerate(requests), key=lambda pair: pair[1][3])
    open_, answers, ends, step = {}, {}, {}, 0
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][1][3] <= step:
            which, (prompt, length, priority, _, patience) = arrivals.pop(0)
            params = SamplingParams(max_tokens=length, temperature=0)
            (request_id,) = engine.add_request(FAMILY[prompt], params, priority=priority)
            open_[request_id] = which
            answers[which] = []
            ends[request_id] = None if patience is None else step + patience
        for request_id, end in ends.items():
            if end == step and request_id in open_:
                assert engine.cancel(request_id).finish_reason == "cancelled"
                del open_[request_id]
        for event in engine.step():
            answers[open_[event.request_id]] += event.token_ids
            if event.completion.finish_reason is not None:
                assert event.completion.token_ids == answers[open_.pop(event.request_id)]
        engine.check()
        step += 1
    assert engine.pool.referenced == 0
    for which, (prompt, length, _, _, patience) in enumerate(requests):
        expected = PLAIN[prompt][:length]
        assert answers[which] == (expected if patience is None else expected[: len(answers[which])])


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", ["v3", "grouped-query with biases", "v2 with yarn"])
def test_log_probabilities_are_those_of_the_whole_sequence(name, chunk, speculative, make_engine):
    config = tiny(**CONFIGS[name])
    model, prompts = randomised(config), prompts_of(tiny(**CONFIGS[name]), [5, 30, 12])
    params = SamplingParams(max_tokens=9, temperature=0, prompt_logprobs=3, logprobs=4)
    engine = make_engine(model, speculative, block_size=4, num_blocks=60, max_step_tokens=chunk)
    for one, prompt in zip(engine.generate(prompts, params), prompts, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + one.token_ids]))[0].log_softmax(-1)
        ids = torch.tensor(prompt[1:] + one.token_ids)
        chosen = expected[:-1].gather(-1, ids[:, None])[:, 0]
        assert one.prompt_logprobs[0] is None
        found = torch.tensor(one.prompt_logprobs[1:] + one.logprobs)
        assert_close(found, chosen, "model_fp32")
        for place, alternatives in enumerate(one.prompt_top_logprobs[1:] + one.top_logprobs):
            best = expected[place].topk(len(alternatives))
            assert list(alternatives) == best.indices.tolist()
            assert_close(torch.tensor(list(alternatives.values())), best.values, "model_fp32")


NARROW = {"kv_lora_rank": 32, "hidden_size": 32, "moe_intermediate_size": 128, "intermediate_size": 32}
NARROW |= {"q_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize(("weights", "cache"), [("float8", "plain"), ("plain", "float8"), ("float8", "float8")])
def test_fp8_answers_depend_on_no_schedule_and_agree_with_plain_ones(weights, cache, speculative, make_engine):
    config = tiny(**CONFIGS["v3"] | NARROW)
    model = randomised(config)
    plain = given_back(model) if weights == "float8" else randomised(config)
    prompts, storage = prompts_of(config, [1, 3, 8, 17, 40, 4]), {"weights": weights, "cache": cache}
    params = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
    alone = make_engine(model, num_blocks=1, block_size=64, **storage)
    expected = [done for prompt in prompts for done in alone.generate([prompt], params)]
    engine = make_engine(model, speculative, block_size=4, num_blocks=14, max_step_tokens=16, **storage)
    for one, theirs in zip(engine.generate(prompts, params), expected, strict=True):
        assert one.token_ids == theirs.token_ids
        # Sums in another order round here and there a latent the other way.
        bound = 1e-4 if cache == "plain" else 2e-2
        assert one.logprobs == pytest.approx(theirs.logprobs, abs=bound)
        with torch.no_grad():
            exact = plain(torch.tensor([one.prompt_token_ids + one.token_ids]))[0].log_softmax(-1)[:-1]
        ids = torch.tensor(one.prompt_token_ids[1:] + one.token_ids)
        found, exact = torch.tensor(one.prompt_logprobs[1:] + one.logprobs), exact.gather(-1, ids[:, None])[:, 0]
        if cache == "plain":
            assert_close(found, exact, "model_fp32")
        else:
            # Where rounding sends a token to another expert, numbers of a model this small jump.
            assert 0 < (found - exact).abs().median() < 0.2
    assert engine.scheduler.preemptions


def test_blocks_of_an_fp8_cache_are_counted_as_they_are(make_engine, monkeypatch):
    config = tiny(**CONFIGS["v3"] | NARROW)
    model = randomised(config)
    monkeypatch.setattr(sizing, "available_bytes", lambda device: 1_000_000)
    for cache, speculative in (("plain", False), ("float8", False), ("float8", True)):
        engine = make_engine(model, speculative, cache=cache, block_size=64, max_sequences=10_000)
        taken = sum(pool.nbytes for pool in engine.runner.pools)
        if speculative:
            taken += engine._drafter.ends.nbytes
        assert engine.pool.size == int(1_000_000 * 0.8) // (taken // engine.pool.size)
    with pytest.raises(ConfigError, match="a float8 cache keeps latents; this model's attention is gqa"):
        make_engine(randomised(tiny(num_key_value_heads=2)), cache="float8")


def test_a_prefix_found_in_the_cache_changes_nothing_but_the_work(make_engine):
    config = tiny(**CONFIGS["v3"])
    model = randomised(config)
    (beginning,) = prompts_of(config, [22])
    engine = make_engine(model, True, block_size=4, num_blocks=60)
    (first,) = engine.generate([[*beginning, 1]], GREEDY)
    (again,) = engine.generate([[*beginning, 1]], GREEDY)
    (other,) = engine.generate([[*beginning, 2, 3]], GREEDY)
    (longer,) = engine.generate([[*beginning, 1, *first.token_ids, 5]], GREEDY)
    assert (first.cached_tokens, again.cached_tokens, other.cached_tokens) == (0, 20, 20)
    # An answer's own rows are found too: all but its last token's, which no step computed.
    assert longer.cached_tokens == 32
    assert again.token_ids == first.token_ids
    assert_close(torch.tensor(again.logprobs), torch.tensor(first.logprobs), "model_fp32")
    for one in (other, longer):
        assert one.token_ids == list(generate(model, one.prompt_token_ids, GREEDY))


@pytest.mark.parametrize("speculative", [False, True])
def test_an_answer_of_one_token_leaves_its_prompt_for_others_to_find(speculative, make_engine):
    config = tiny(**CONFIGS["v3"])
    model, (prompt,) = randomised(config), prompts_of(config, [20])
    engine = make_engine(model, speculative, block_size=4, num_blocks=60)
    (first,) = engine.generate([prompt], GREEDY.replace(max_tokens=1))
    (again,) = engine.generate([[*prompt, 5]], GREEDY)
    assert (first.cached_tokens, again.cached_tokens) == (0, 20)
    assert again.token_ids == list(generate(model, [*prompt, 5], GREEDY))


def test_a_failed_answer_leaves_nothing_for_others_to_find(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    engine = make_engine(model, True, block_size=4, num_blocks=20)
    for _ in range(2):
        (broken,) = engine.generate([[9] * 13], GREEDY)
        assert (broken.finish_reason, broken.cached_tokens) == ("error", 0)


def test_prompts_of_different_salts_share_nothing(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine, found = make_engine(model, block_size=4, num_blocks=60), []
    for salt in ("alice", "bob", "alice"):
        engine.add_request(list(range(20)), GREEDY, salt=salt)
        while engine.has_work:
            found += [event.completion for event in engine.step() if event.completion.finish_reason]
    assert [one.cached_tokens for one in found] == [0, 0, 16]


def test_several_answers_share_the_blocks_of_their_prompt(make_engine):
    config = tiny(**CONFIGS["v3"])
    model, (prompt,) = randomised(config), prompts_of(config, [24])
    engine = make_engine(model, block_size=4, num_blocks=60)
    params = SamplingParams(max_tokens=8, n=3, seed=1)
    done = engine.generate([prompt], params)
    assert [one.index for one in done] == [0, 1, 2]
    assert [one.cached_tokens for one in done] == [0, 20, 20]
    assert len({tuple(one.token_ids) for one in done}) == 3
    assert done[0].token_ids == list(generate(model, prompt, params.replace(n=1)))
    lonely = make_engine(model, block_size=4, num_blocks=60, prefix_caching=False).generate([prompt], params)
    assert [one.token_ids for one in lonely] == [one.token_ids for one in done]


@pytest.mark.usefixtures("_as_a_user")
def test_blocks_that_run_out_put_the_last_request_back_and_the_answers_stay(make_engine):
    config = tiny(**CONFIGS["v3"])
    model, prompts = randomised(config), prompts_of(config, [4] * 6)
    params = SamplingParams(max_tokens=30, temperature=0)
    engine = make_engine(model, block_size=4, num_blocks=20)
    done = engine.generate(prompts, params)
    assert engine.scheduler.preemptions > 0
    assert [one.token_ids for one in done] == [list(generate(model, prompt, params)) for prompt in prompts]


@pytest.mark.usefixtures("_as_a_user")
def test_ten_thousand_requests_added_and_cancelled_at_random_leave_the_pool_whole(make_engine):
    config = tiny(**CONFIGS["multi-query with predictions"], num_hidden_layers=1)
    dice = random.Random(0)
    engine = make_engine(randomised(config), True, block_size=2, num_blocks=70, max_step_tokens=200, max_sequences=40)
    live: list[int] = []
    for count in range(10_000):
        prompt = [dice.randrange(3) for _ in range(dice.randint(1, 4))]
        live += engine.add_request(prompt, SamplingParams(max_tokens=dice.randint(1, 4), seed=0))
        if dice.random() < 0.3:
            engine.cancel(live.pop(dice.randrange(len(live))))
        if count % 25 == 0:
            engine.step()
            live = live[-60:]
        if count % 2500 == 0:
            engine.check()
    while engine.has_work:
        engine.step()
    engine.check()
    assert engine.pool.referenced == 0
    assert engine.statistics.preemptions > 0
    assert sum(engine.statistics.finished.values()) == 10_000
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running


def test_a_request_whose_states_are_no_numbers_spoils_no_block_for_others(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    engine = make_engine(model, True, block_size=8, num_blocks=4, prefix_caching=False)
    prompts = [[1, 2], [3] * 7]
    expected = [list(generate(model, prompt, GREEDY.replace(max_tokens=5))) for prompt in prompts]
    for _ in range(2):
        (broken,) = engine.generate([[9] * 20], GREEDY.replace(max_tokens=5))
        assert broken.finish_reason == "error"
        done = engine.generate(prompts, GREEDY.replace(max_tokens=5))
        assert [one.token_ids for one in done] == expected


def test_what_an_event_cancels_ends_the_call(make_engine):
    engine = make_engine(randomised(tiny(**CONFIGS["v3"])), num_blocks=20)
    ids = []

    def cancel_all(event):
        ids.append(event.request_id)
        for request_id in (0, 1):
            engine.cancel(request_id)

    done = engine.generate([[1], [2]], GREEDY, cancel_all)
    assert [one.finish_reason for one in done] == ["cancelled", "cancelled"]
    assert len(done[0].token_ids) == 1


def test_a_fault_while_an_answer_is_written_costs_that_answer_alone(make_engine, monkeypatch):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine, take = make_engine(model, True, block_size=4, num_blocks=40), Answer.take

    def faulty(answer, drawn):
        if answer.completion.prompt_token_ids == [2, 2] and len(answer.completion.token_ids) == 3:
            raise ValueError("no such text")
        take(answer, drawn)

    monkeypatch.setattr(Answer, "take", faulty)
    first, broken, last = engine.generate([[1], [2, 2], [3]], GREEDY)
    assert (broken.finish_reason, broken.error) == ("error", "ValueError: no such text")
    assert [one.token_ids for one in (first, last)] == [list(generate(model, [n], GREEDY)) for n in (1, 3)]


@pytest.mark.parametrize("place", ["paged_states", "paged_prediction"])
def test_a_step_that_fails_can_cost_its_answers_alone(place, make_engine, monkeypatch):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine = make_engine(model, True, block_size=4, num_blocks=40, max_sequences=2, max_step_tokens=4)
    ids = [engine.add_request(prompt, GREEDY)[0] for prompt in ([1, 2], [3, 4, 5, 6, 7, 8], [9])]
    engine.step()

    def faulty(*arguments):
        raise ValueError("no such weight")

    with monkeypatch.context() as patch:
        patch.setattr(model, place, faulty)
        try:
            events = engine.step()
        except ValueError as error:
            events = engine.fail_running(error)
    assert [event.request_id for event in events] == ids[:2]
    assert {event.completion.error for event in events} == {"ValueError: no such weight"}
    ends = []
    while engine.has_work:
        ends += [event.completion for event in engine.step() if event.completion.finish_reason]
    assert [one.token_ids for one in ends] == [list(generate(model, [9], GREEDY))]


def test_routed_experts_are_those_of_the_whole_sequence(make_engine):
    config = tiny(**CONFIGS["v3"])
    model, prompts = randomised(config), prompts_of(config, [20, 6])
    engine = make_engine(model, True, block_size=4, num_blocks=40, max_step_tokens=8)
    for one in engine.generate(prompts, GREEDY.replace(routed_experts=True)):
        whole = torch.tensor([one.prompt_token_ids + one.token_ids[:-1]])
        with torch.no_grad():
            routing = model.states(whole).routing
        expected = torch.stack([routing[layer].experts for layer in sorted(routing)], 1)
        assert torch.equal(one.routed_experts.long().sort(-1).values, expected.sort(-1).values)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)


@pytest.mark.parametrize("speculative", [False, True])
def test_text_ends_before_a_stop_and_arrives_in_pieces(tokenizer, speculative, make_engine):
    model = randomised(tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size))
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=1)
    whole = "".join(generate_text(model, tokenizer, "def add", params))
    engine, seen = make_engine(model, speculative, tokenizer), []
    (done,) = engine.generate(["def add"], params, on_event=lambda event: seen.append(event.text))
    assert done.text == whole == "".join(seen)
    assert len(seen) > 5
    stop = whole[11:14]
    (stopped,) = engine.generate(["def add"], params.replace(stop=("\x00never", stop)))
    assert stopped.text == whole[: whole.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    end = done.token_ids[7]
    first = done.token_ids.index(end)
    (ended,) = engine.generate(["def add"], params.replace(stop_token_ids=(end,)))
    assert ended.token_ids == done.token_ids[:first]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", end)
    (late,) = engine.generate(["def add"], params.replace(stop_token_ids=(end,), min_tokens=20))
    assert end not in late.token_ids[:20]
    assert len(late.token_ids) >= 20


def test_the_end_of_sequence_ends_unless_it_is_ignored(make_engine):
    config = tiny(**CONFIGS["v3"])
    model, prompt = randomised(config), [1, 2, 3]
    ids = list(generate(model, prompt, GREEDY))
    model.config = config.replace(eos_token_id=ids[4])
    engine, first = make_engine(model), ids.index(ids[4])
    (ended,) = engine.generate([prompt], GREEDY)
    assert (ended.token_ids, ended.finish_reason) == (ids[:first], "stop")
    (whole,) = engine.generate([prompt], GREEDY.replace(ignore_eos=True))
    assert (whole.token_ids, whole.finish_reason) == (ids, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt has no tokens"),
        ([61], GREEDY, "token 61; the model's vocabulary is 0 to 60"),
        ([1] * 60, GREEDY, "60 prompt tokens and max_tokens 10 exceed the model's 64 positions"),
        ([1] * 40, GREEDY, "40 prompt tokens and max_tokens 10 do not fit the cache of 6 blocks of 8 tokens"),
        ([1], GREEDY.replace(logit_bias={61: 1.0}), "logit_bias names token 61"),
        ([1], GREEDY.replace(stop_token_ids=(61,), min_tokens=1), "stop_token_ids names token 61"),
        (None, GREEDY, "a prompt is text or a list of token ids, not NoneType"),
        (b"text", GREEDY, "a prompt is text or a list of token ids, not bytes"),
        (torch.tensor([1, 2]), GREEDY, "a prompt is text or a list of token ids, not Tensor"),
        ([1, 2.0], GREEDY, "the prompt holds 2.0, a float; token ids are whole numbers"),
        ([1, True], GREEDY, "the prompt holds True, a bool"),
        ([None], GREEDY, "the prompt holds None, a NoneType"),
        ([1], {"max_tokens": 1}, "what is asked for must be SamplingParams, not dict"),
        ([1], [GREEDY, None], "what is asked for must be SamplingParams, not NoneType"),
        ([1], [GREEDY], "2 prompts came with 1 sampling parameters"),
        ("text", GREEDY, "the prompt is text, but this model has no tokenizer"),
        ([1], GREEDY.replace(stop=("x",)), "stop strings and forms need text"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt, params, message, make_engine):
    engine = make_engine(randomised(tiny(**CONFIGS["v3"])), block_size=8, num_blocks=6)
    with pytest.raises(RequestError) as caught:
        engine.generate([[1, 2], prompt], params)
    assert message in str(caught.value)
    assert not engine.has_work


@pytest.mark.parametrize("prompts", ["text", None, 3, ([1] for _ in range(2))])
def test_prompts_are_a_list(prompts, make_engine):
    with pytest.raises(RequestError, match="prompts must be a list, not"):
        make_engine(randomised(tiny(**CONFIGS["v3"])), num_blocks=4).generate(prompts, GREEDY)


@pytest.mark.parametrize("order", [{"priority": 0.5}, {"priority": "high"}, {"salt": None}])
def test_an_order_of_the_wrong_type_is_refused(order, make_engine):
    with pytest.raises(RequestError, match="a priority is a whole number, a salt and an owner are text"):
        make_engine(randomised(tiny(**CONFIGS["v3"])), num_blocks=4).add_request([1], GREEDY, **order)


def test_a_full_queue_refuses(make_engine):
    engine = make_engine(randomised(tiny(**CONFIGS["v3"])), max_waiting=2)
    engine.add_request([1], GREEDY.replace(n=2))
    with pytest.raises(CapacityError, match="2 requests wait already; max_waiting is 2"):
        engine.add_request([1], GREEDY)
    for request_id in (0, 1):
        engine.cancel(request_id)
    assert engine.cancel(1) is None


def test_logits_that_are_no_numbers_cost_the_request_and_not_the_engine(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine = make_engine(model, num_blocks=20)
    kept = model.lm_head.weight[0].clone()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
        (broken,) = engine.generate([[1, 2]], GREEDY)
        model.lm_head.weight[0] = kept
    assert broken.finish_reason == "error"
    assert "the model's logits are not finite" in broken.error
    (fine,) = engine.generate([[1, 2]], GREEDY)
    assert fine.token_ids == list(generate(model, [1, 2], GREEDY))


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("speculative", [False, True])
def test_a_device_without_memory_for_a_step_gets_smaller_ones(speculative, make_engine, monkeypatch):
    model = randomised(tiny(**CONFIGS["v3"]))
    states = model.paged_states

    def up_to_five(ids, pages):
        if len(ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.\ndetails")
        return states(ids, pages)

    monkeypatch.setattr(model, "paged_states", up_to_five)
    engine = make_engine(model, speculative, max_step_tokens=64, num_blocks=20)
    prompts = [[n] * (n + 1) for n in range(12)]
    done = engine.generate(prompts, GREEDY)
    assert engine.scheduler.step_tokens == 4
    assert [one.token_ids for one in done] == [list(generate(model, prompt, GREEDY)) for prompt in prompts]
    monkeypatch.setattr(model, "paged_states", lambda ids, pages: up_to_five([0] * 6, pages))
    with pytest.raises(CapacityError, match="no memory for a step of one token: CUDA out of memory"):
        engine.generate([[1]], GREEDY)
    assert not engine.has_work


def test_changed_weights_are_not_served_from_the_cache_of_the_old_ones(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine, prompt = make_engine(model, block_size=4, num_blocks=40), list(range(20))
    engine.generate([prompt], GREEDY)
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.mul_(-1)
    engine.forget_prefixes()
    (done,) = engine.generate([prompt], GREEDY)
    assert done.cached_tokens == 0
    assert done.token_ids == list(generate(model, prompt, GREEDY))


def test_the_public_engine_opens_a_folder(tmp_path, tokenizer):
    model = randomised(tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size, dtype="float32"))
    save_model(model, tmp_path, weights="fp32")
    tokenizer.save(tmp_path)
    engine = benthic.Engine(tmp_path, device="cpu", speculative=True)
    (done,) = engine.generate(["def f("], benthic.SamplingParams(max_tokens=32, temperature=0.0))
    prompt = tokenizer.encode("def f(", add_bos=tokenizer.add_bos_token)
    assert done.token_ids == list(generate(model, prompt, SamplingParams(max_tokens=32, temperature=0)))
    assert done.text == tokenizer.decode(done.token_ids, skip_special=True)
    assert len(done.logprobs) == len(done.token_ids)
    assert done.drafted_tokens > 0


def test_a_model_without_prediction_layers_decodes_plainly_and_the_log_says_so(make_engine, caplog):
    config = tiny(**CONFIGS["v2 with yarn"])
    with caplog.at_level("INFO", logger="benthic"):
        (done,) = make_engine(randomised(config), True).generate([[1, 2]], GREEDY)
    assert "the model has no prediction layers; it decodes plainly, without drafts" in caplog.text
    assert done.drafted_tokens == 0


def test_statistics_add_up(make_engine):
    model = randomised(tiny(**CONFIGS["v3"]))
    engine = make_engine(model, True, block_size=4, num_blocks=40)
    assert engine.statistics.acceptance is None
    done = engine.generate([[1] * 9, [1] * 9, [2]], GREEDY)
    done += engine.generate([[1] * 9], GREEDY)
    (request_id,) = engine.add_request([3], GREEDY)
    (waiting,) = engine.add_request([4], GREEDY)
    engine.cancel(request_id)
    found = engine.statistics
    assert found.finished == {"length": 4, "cancelled": 1}
    assert found.completion_tokens == 40
    assert found.cached_tokens == sum(one.cached_tokens for one in done) > 0
    assert found.prompt_tokens == 29
    assert found.acceptance == found.accepted_tokens / found.drafted_tokens
    assert (found.waiting, found.running, found.free_blocks, found.blocks) == (1, 0, 40, 40)
    engine.cancel(waiting)

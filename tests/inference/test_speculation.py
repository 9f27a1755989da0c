"""Drafts are what the prediction layers say in training, and what they add is speed alone."""

from __future__ import annotations

import pytest
import torch

from benthic.inference.generate import generate
from benthic.model import LanguageModel, initialise
from benthic.model.sampling import SamplingParams
from benthic.ops import linear_cross_entropy
from tests.model.configs import CONFIGS, randomised, tiny, tokens

PREDICTING = [name for name in CONFIGS if CONFIGS[name].get("num_nextn_predict_layers")]


@torch.inference_mode()
def drafts_of_training(model, known, count):
    """What each prediction layer's last state says, in one pass over the whole sequence."""
    ids = list(known)
    for depth in range(1, min(count, model.config.num_nextn_predict_layers) + 1):
        state = model.states(torch.tensor([ids]), num_predictions=depth).predictions[depth - 1][0, -1]
        ids.append(int((model.head_weight @ state).argmax()))
    return ids[len(known) :]


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("name", PREDICTING)
def test_drafts_are_those_of_training_behind_chunks_found_prefixes_and_preemption(name, chunk, make_engine):
    config = tiny(**CONFIGS[name])
    model = randomised(config)
    engine = make_engine(model, True, block_size=4, num_blocks=18, max_step_tokens=chunk, draft_tokens=3)
    prompts = [tokens(config, 1, length, length)[0].tolist() for length in (1, 2, 9, 20)]
    for prompt in (*prompts, [*prompts[3], 1], [*prompts[3], 2]):
        engine.add_request(prompt, SamplingParams(max_tokens=9, temperature=0))
    compared, found = 0, 0
    while engine.has_work:
        for event in engine.step():
            found += event.completion.cached_tokens > 0
        for request in engine.scheduler.running:
            if request.drafts:
                expected = drafts_of_training(model, request.tokens, len(request.drafts))
                assert request.drafts[: len(expected)] == expected
                compared += 1
    assert compared > 20
    assert found
    assert engine.scheduler.preemptions or chunk == 3


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("name", PREDICTING)
def test_drafts_go_on_behind_the_prompt_of_an_answer_of_one_token(name, make_engine):
    config = tiny(**CONFIGS[name])
    model = randomised(config)
    engine = make_engine(model, True, block_size=4, num_blocks=18, draft_tokens=3)
    prompt = tokens(config, 1, 20, 20)[0].tolist()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    engine.add_request([*prompt, 1], SamplingParams(max_tokens=9, temperature=0))
    compared = 0
    while engine.has_work:
        (event,) = engine.step()
        assert event.completion.cached_tokens == 20
        for request in engine.scheduler.running:
            expected = drafts_of_training(model, request.tokens, len(request.drafts))
            assert request.drafts[: len(expected)] == expected
            compared += bool(request.drafts)
    assert compared > 2


@pytest.mark.usefixtures("_as_a_user")
def test_layers_that_run_out_of_memory_cost_time_and_no_token(make_engine, monkeypatch):
    config = tiny(**CONFIGS["v3 of two predictions"])
    model = randomised(config)
    calls, predict = [], model.paged_prediction

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) in (4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(*arguments)

    monkeypatch.setattr(model, "paged_prediction", sometimes)
    engine = make_engine(model, True, block_size=4, num_blocks=60)
    prompts = [tokens(config, 1, length, length)[0].tolist() for length in (5, 9, 20)]
    params = SamplingParams(max_tokens=9, temperature=0)
    done = engine.generate(prompts, params)
    assert engine.scheduler.preemptions == 6
    assert [one.token_ids for one in done] == [list(generate(model, prompt, params)) for prompt in prompts]


def trained(config, steps=150):
    """A model that has learnt to count in threes, prediction layer included."""
    model = LanguageModel(config)
    initialise(model, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        start = torch.randint(0, config.vocab_size, (8, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + 3 * torch.arange(17)) % config.vocab_size
        states = model.states(ids[:, :-1], num_predictions=1)
        loss = linear_cross_entropy(states.hidden.flatten(0, 1), model.head_weight, ids[:, 1:].flatten())[0]
        ahead = linear_cross_entropy(states.predictions[0].flatten(0, 1), model.head_weight, ids[:, 2:].flatten())[0]
        optimizer.zero_grad()
        ((loss + ahead) / ids.numel()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.usefixtures("_as_a_user")
def test_a_trained_layer_is_mostly_right_and_halves_the_steps(make_engine):
    model = trained(tiny(**CONFIGS["v3"], vocab_size=31))
    prompts = [[n, (n + 3) % 31, (n + 6) % 31] for n in range(8)]
    for params in (
        SamplingParams(max_tokens=30, temperature=0),
        SamplingParams(max_tokens=30, temperature=0.5, seed=1),
    ):
        engine = make_engine(model, True)
        steps, step = [], engine.step
        engine.step = lambda steps=steps, step=step: steps.append(1) or step()
        done = engine.generate(prompts, params)
        assert [one.token_ids for one in done] == [list(generate(model, prompt, params)) for prompt in prompts]
        accepted, drafted = sum(one.accepted_tokens for one in done), sum(one.drafted_tokens for one in done)
        assert accepted / drafted > 0.8
        assert len(steps) < 22


@pytest.mark.usefixtures("_as_a_user")
def test_sampling_with_drafts_keeps_the_distribution(make_engine):
    model = trained(tiny(**CONFIGS["v3"], vocab_size=31), steps=40)
    params = SamplingParams(max_tokens=3, temperature=1.3, n=100, seed=0)
    done = make_engine(model, True).generate([[1, 4, 7, 10]] * 10, [params.replace(seed=seed) for seed in range(10)])
    assert sum(one.accepted_tokens for one in done) > 50
    pairs = torch.tensor([one.token_ids[1:] for one in done])
    with torch.no_grad():
        # The second and third token's distribution over all 31 x 31 ways, the first one summed out.
        first = (model(torch.tensor([[1, 4, 7, 10]]))[0, -1] / 1.3).softmax(-1)
        seconds = torch.stack([torch.tensor([1, 4, 7, 10, token]) for token in range(31)])
        second = (model(seconds)[:, -1] / 1.3).softmax(-1)
    expected = (first[:, None] * second).sum(0)
    found = torch.bincount(pairs[:, 0], minlength=31) / len(done)
    # Four standard deviations of a share p of 1,000 draws.
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / len(done)).sqrt() + 1e-3).all()

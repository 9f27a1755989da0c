"""Generation over a cache draws what the whole sequence's logits say, and stops where it should."""

from __future__ import annotations

import re

import pytest
import torch

from benthic.errors import RequestError
from benthic.inference.generate import generate, generate_text
from benthic.model import LanguageModel
from benthic.model.sampling import Sampler, SamplingParams
from benthic.ops import linear_cross_entropy
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny, tokens

GREEDY = SamplingParams(max_tokens=12, temperature=0)


def uncached(model: LanguageModel, prompt: list[int], params: SamplingParams) -> list[int]:
    sampler, ids = Sampler(params), list(prompt)
    with torch.no_grad():
        for _ in range(params.max_tokens):
            ids.append(sampler.draw(model(torch.tensor([ids]))[0, -1]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=12, temperature=0.8, top_k=9, top_p=0.9, seed=5)])
def test_cached_generation_equals_generation_from_whole_sequences(name, params):
    config = tiny(**CONFIGS[name])
    model, prompt = randomised(config), tokens(config, 1, 5)[0].tolist()
    assert list(generate(model, prompt, params)) == uncached(model, prompt, params)


def test_an_end_token_ends_and_is_not_given():
    config = tiny(**CONFIGS["v3"])
    model, prompt = randomised(config), [1, 2, 3]
    ids = list(generate(model, prompt, GREEDY))
    end = ids[6]
    first = ids.index(end)
    model.config = config.replace(eos_token_id=(60, end))
    assert list(generate(model, prompt, GREEDY)) == ids[:first]
    model.config = config.replace(eos_token_id=end)
    assert list(generate(model, prompt, GREEDY)) == ids[:first]
    model.config = config
    assert list(generate(model, prompt, GREEDY.replace(stop_token_ids=(end,)))) == ids[:first]


def test_the_whole_length_of_the_model_can_be_used():
    config = tiny(**CONFIGS["v3"], max_position_embeddings=16)
    model = randomised(config)
    assert len(list(generate(model, [1, 2, 3, 4], GREEDY))) == 12
    with pytest.raises(RequestError) as caught:
        generate(model, [1, 2, 3, 4, 5], GREEDY)
    assert "5 prompt tokens and max_tokens 12 exceed the model's 16 positions" in str(caught.value)
    assert "set max_tokens to at most 11" in str(caught.value)
    with pytest.raises(RequestError, match="shorten the prompt"):
        generate(model, [1] * 16, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no tokens"),
        ([3, 61], "the prompt holds token 61; the model's vocabulary is 0 to 60"),
        ([-1], "token -1"),
    ],
)
def test_wrong_prompts_are_refused_before_the_first_token(prompt, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        generate(randomised(tiny(**CONFIGS["v3"])), prompt, GREEDY)


def test_training_goes_on_after_generation():
    # Samples during a run are drawn in inference mode; what they leave behind must not stop a backward pass.
    config = tiny(**CONFIGS["v3"])
    model = randomised(config)
    list(generate(model, [1, 2, 3], GREEDY))
    hidden = model.states(tokens(config, 2, 6)).hidden
    linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens(config, 1, 12)[0])[0].backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[0].parameters())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)


def test_text_arrives_in_pieces_and_ends_before_a_stop(tokenizer):
    config = tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size)
    model = randomised(config)
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=1)
    pieces = list(generate_text(model, tokenizer, "def add", params))
    text = "".join(pieces)
    prompt = tokenizer.encode("def add", add_bos=tokenizer.add_bos_token)
    expected = tokenizer.decode(list(generate(model, prompt, params)), skip_special=True)
    assert text == expected
    assert len(pieces) > 5
    stop = text[11:14]
    stopped = "".join(generate_text(model, tokenizer, "def add", params.replace(stop=("\x00never", stop))))
    assert stopped == text[: text.index(stop)]


def test_what_could_start_a_stop_is_held_back_and_then_given():
    from benthic.inference.generate import _until_stop

    assert list(_until_stop(iter(["ab", "EN", "x", "EN", "D", "later"]), ["END"])) == ["ab", "ENx"]
    assert "".join(_until_stop(iter(["ab", "EN"]), ["END"])) == "abEN"
    assert "".join(_until_stop(iter(["aXbY"]), ["Y", "X"])) == "a"
    assert "".join(_until_stop(iter(["a", "b"]), [])) == "ab"

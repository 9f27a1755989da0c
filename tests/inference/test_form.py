"""Bound answers have their form, with drafts and without, whatever the model would rather say."""

from __future__ import annotations

import json
import re

import pytest

from benthic.errors import RequestError
from benthic.inference.form import Forms
from benthic.model.sampling import SamplingParams
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["add", "return"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['def add(first, second):\n    return {"name": "add", "count": 17}\n' * 20], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomised(
        tiny(
            **CONFIGS["v3"],
            vocab_size=tokenizer.vocab_size + 3,
            eos_token_id=tokenizer.eos_id,
            max_position_embeddings=512,
        )
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculative", [False, True])
def test_answers_are_json_of_the_schema(model, tokenizer, speculative, temperature, make_engine):
    engine = make_engine(model, speculative, tokenizer, block_size=4, num_blocks=900)
    params = SamplingParams(max_tokens=400, temperature=temperature, n=4, seed=2, json_schema=SCHEMA)
    done = engine.generate(["def ", "x"], params)
    assert {one.finish_reason for one in done} == {"stop"}
    for one in done:
        answer = json.loads(one.text)
        assert set(answer) == {"name", "count"}
        assert answer["name"] in ("add", "return")
        assert 0 <= answer["count"] <= 99


@pytest.mark.parametrize("speculative", [False, True])
def test_drafts_do_not_change_a_bound_answer(model, tokenizer, speculative, make_engine):
    wishes = [
        SamplingParams(max_tokens=24, temperature=0.7, seed=5, regex=r"(add|re)[a-f]{2,9}\."),
        SamplingParams(max_tokens=24, temperature=0, grammar='start: "(" /[0-9]+/ ("," /[0-9]+/)* ")"'),
    ]
    plain = make_engine(model, False, tokenizer).generate(["a", "b"], wishes)
    done = make_engine(model, speculative, tokenizer, draft_tokens=3).generate(["a", "b"], wishes)
    assert [one.text for one in done] == [one.text for one in plain]
    if done[0].finish_reason == "stop":
        assert re.fullmatch(r"(add|re)[a-f]{2,9}\.", done[0].text)
    assert re.match(r"\([0-9]+", done[1].text)


def test_a_form_that_fails_behind_a_draft_still_stands_before_it(tokenizer):
    form = Forms(tokenizer, tokenizer.vocab_size, frozenset()).make(SamplingParams(grammar='start: "b" | "a"~1000000'))
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    form.allowed([a, a])
    assert not form.error
    form.take(b)
    assert form.is_complete
    assert not form.error


def test_a_form_looks_ahead_over_drafts_and_steps_back(tokenizer):
    form = Forms(tokenizer, tokenizer.vocab_size, frozenset()).make(SamplingParams(regex="ab*c"))
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    first, second, third, fourth = form.allowed([a, b, a])
    assert first.nonzero().flatten().tolist() == [a]
    assert {b, c} <= set(second.nonzero().flatten().tolist())
    assert third[b]
    assert third[c]
    assert fourth is None
    # Nothing of that was taken.
    assert form.allowed()[0][a]
    assert not form.allowed()[0][b]
    for token in (a, c):
        form.take(token)
    assert form.is_complete
    assert not form.error


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"regex": "(unclosed"}, "regex cannot be used"),
        ({"json_schema": "no json"}, "json_schema cannot be used"),
        ({"json_schema": {"type": "nothing"}}, "json_schema cannot be used"),
        ({"grammar": "start: missing"}, "grammar cannot be used"),
        ({"regex": ""}, "regex cannot be used: no text but an empty one, or none at all, has this form"),
        ({"json_schema": {"$ref": "#"}}, "no text but an empty one, or none at all, has this form"),
        ({"grammar": 'start: start "a"'}, "no text but an empty one, or none at all, has this form"),
    ],
)
def test_a_form_that_cannot_be_is_refused_at_once(model, tokenizer, wish, message, make_engine):
    engine = make_engine(model, False, tokenizer, num_blocks=20)
    with pytest.raises(RequestError, match=message):
        engine.add_request("x", SamplingParams(max_tokens=5, **wish))
    assert not engine.has_work

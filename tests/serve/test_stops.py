"""Stop texts cut an answer exactly, wherever tokens, characters and accepted drafts end."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from benthic.text import Tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "drafts"])
def strict(request, start, server) -> Iterator[openai.OpenAI]:
    """A client of a server with or without drafts."""
    mine = start("--speculative").wait_until_ready() if request.param else server
    with openai.OpenAI(base_url=f"{mine.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one
    if request.param:
        mine.stop()


def chat(client, **options):
    messages = [{"role": "user", "content": "def add"}]
    return client.chat.completions.create(model="tiny", messages=messages, **({"max_tokens": 120} | options))


def ids_of(folder, text):
    """A token for each byte."""
    tokenizer = Tokenizer.from_folder(folder)
    return [next(one for one in range(300) if tokenizer.token_bytes(one) == bytes([byte])) for byte in text.encode()]


def pieces_of(whole):
    return [bytes(one.bytes) for one in whole.choices[0].logprobs.content]


def assert_cut(client, whole, options, stop):
    """The answer with `stop` is the one without, up to it; usage and log-probabilities are of the tokens drawn."""
    text = whole.choices[0].message.content
    answer = chat(client, **options, stop=stop)
    choice, stops = answer.choices[0], [stop] if isinstance(stop, str) else stop
    places = [place for one in stops if (place := text.find(one)) >= 0]
    assert choice.message.content == (text[: min(places)] if places else text)
    assert choice.finish_reason == ("stop" if places else "length")
    tokens = [one.token for one in choice.logprobs.content]
    assert answer.usage.completion_tokens == len(tokens)
    assert tokens == [one.token for one in whole.choices[0].logprobs.content][: len(tokens)]
    if places:
        shown = b"".join(pieces_of(answer))
        assert any(one.encode() in shown for one in stops)
        without_last = b"".join(pieces_of(answer)[:-1])
        assert not any(one.encode() in without_last for one in stops)
    streamed, reason = "", None
    for chunk in chat(client, **options, stop=stop, stream=True):
        streamed += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (choice.message.content, choice.finish_reason)


@pytest.mark.parametrize("seed", range(2))
def test_a_stop_inside_tokens_and_over_several_of_them(strict, seed):
    letters = {str(token): 8 for token in range(60, 100)}
    options = {"seed": seed, "logprobs": True, "logit_bias": letters}
    whole = chat(strict, **options)
    text = whole.choices[0].message.content
    assert "�" not in text
    for begin, length in ((0, 1), (3, 2), (10, 3), (21, 5), (30, 8), (44, 4), (70, 6)):
        assert_cut(strict, whole, options, text[begin : begin + length])
    assert_cut(strict, whole, options, [text[40:43], text[20:23], "never said", text[60:]])
    assert_cut(strict, whole, options, "never said")


@pytest.mark.parametrize(("stop", "max_tokens"), [("é", 30), ("éé", 60), ("中", 150)])
def test_a_stop_of_characters_that_tokens_cut(strict, folder, stop, max_tokens):
    bias = {str(one): 60 for one in ids_of(folder, stop[0])}
    options = {"seed": 3, "logprobs": True, "temperature": 2, "logit_bias": bias, "max_tokens": max_tokens}
    whole = chat(strict, **options)
    assert stop in whole.choices[0].message.content
    assert_cut(strict, whole, options, stop)


def test_a_stop_inside_a_pair_of_accepted_drafts(strict, folder):
    """Every draft is accepted where one token is forced, so the stop ends between two tokens of a step."""
    (token,) = ids_of(folder, "x")
    options = {"temperature": 0, "logprobs": True, "logit_bias": {str(token): 100}}
    whole = chat(strict, **options)
    for length in (1, 2, 3, 4, 7):
        assert_cut(strict, whole, options, "x" * length)
        assert chat(strict, **options, stop="x" * length).usage.completion_tokens == length

"""Each parameter at the edges of what it may be: refused with its name, or honoured as documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from benthic.serve.requests import ChatRequest, CompletionRequest
from benthic.text import Tokenizer
from tests.serve.speaking import CHAT, HELLO, PLAIN, assert_refused, post

VALUES = {
    "null": [None],
    "boolean": [True, False],
    "string": ["", "1", "é" * 300],
    "integer": [0, 1, -1, 2**63, -(2**70)],
    "number": [0.5, 1e308],
    "array": [[], [[]], [{"x": 1}]],
    "object": [{}, {"x": []}],
}
TAKES = {
    "integer": "max_tokens n top_k seed min_tokens max_completion_tokens top_logprobs best_of",
    "number integer": "temperature top_p min_p presence_penalty frequency_penalty repetition_penalty",
    "boolean": "stream ignore_eos parallel_tool_calls echo store",
    "string": "model user cache_salt service_tier suffix reasoning_effort",
    "string array": "stop prompt",
    "array": "stop_token_ids messages tools modalities",
    "object": "logit_bias stream_options structured_outputs response_format chat_template_kwargs",
    "string object": "tool_choice",
    "": "metadata prediction audio functions function_call verbosity web_search_options",
}
KINDS = {field: set(kinds.split()) for kinds, fields in TAKES.items() for field in fields.split()}
KINDS_OF_ENDPOINT = {
    (CHAT, "logprobs"): {"boolean"},
    (PLAIN, "logprobs"): {"integer"},
}
FINE = {CHAT: {"messages": HELLO, "max_tokens": 1}, PLAIN: {"prompt": "x", "max_tokens": 1}}


@pytest.mark.parametrize(("path", "model"), [(CHAT, ChatRequest), (PLAIN, CompletionRequest)], ids=["chat", "plain"])
def test_a_value_of_a_wrong_type_is_a_400_that_names_the_field(server, path, model):
    refused = 0
    for field in model.model_fields:
        takes = KINDS_OF_ENDPOINT.get((path, field)) or KINDS[field]
        for kind, values in VALUES.items():
            for value in values:
                if field == "stream" and value is True:
                    continue  # not JSON but events: other tests read them
                status, body = post(server, path, FINE[path] | {field: value})
                if kind in takes or value is None:
                    assert status in (200, 400, 404), (field, value, body)
                else:
                    assert status == 400, (field, value, body)
                    assert body["error"]["param"].split(".")[0] == field, (field, value, body)
                    refused += 1
    assert refused >= 12 * len(model.model_fields)


EDGES = {
    "temperature": ([0, -0.0, 5e-324, 1e-10, 0.5, 1, 2, 2.0], [-0.1, -5e-324, 2.0000001, 2.01, 1e308, -1]),
    "top_p": ([5e-324, 0.1, 1, 1.0], [0, -0.0, 1.0000001, 1.1, -0.5, 2]),
    "top_k": ([-1, 0, 1, 2, 300, 10**6, 2**31 - 1], [-2, 2**31, 2**63, 0.5]),
    "min_p": ([0, -0.0, 5e-324, 0.5, 1], [-0.1, 1.1, 2]),
    "presence_penalty": ([-2, -1.5, 0, 2, 2.0], [-2.01, 2.01, 1e308]),
    "frequency_penalty": ([-2, -1.5, 0, 2, 2.0], [-2.01, 2.01, -1e308]),
    "repetition_penalty": ([0.01, 0.5, 1, 100], [0, -1, 5e-324, 0.0099, 100.1]),
    "seed": ([0, -1, 2**63 - 1, -(2**63), 42.0], [2**63, -(2**63) - 1, 0.5]),
    "max_tokens": ([1, 2, 2.0], [0, -1, 2**31, 2**63, 1.5]),
    "min_tokens": ([0, 1, 3], [-1, 4, 2**31]),
    "n": ([1, 2, 16], [0, -1, 17, 16384, 10**9, 1.5]),
    "stop_token_ids": ([[], [0], [5, 5]], [[-1], [2**31], [0.5], [0] * 129]),
}


def cases():
    return [
        (path, field, value, fine)
        for path in (CHAT, PLAIN)
        for field, (good, bad) in EDGES.items()
        for values, fine in ((good, True), (bad, False))
        for value in values
    ]


def test_there_are_150_edges():
    assert len(cases()) >= 150


def test_a_number_at_its_edge_is_honoured_and_beyond_it_refused(server):
    for path, field, value, fine in cases():
        status, body = post(server, path, FINE[path] | {"max_tokens": 3, field: value})
        assert status == (200 if fine else 400), (path, field, value, body)
        if not fine:
            assert body["error"]["param"].split(".")[0] == field, (path, value, body)


def test_greedy_is_greedy_however_it_is_said(server):
    ways = ({"temperature": 0}, {"temperature": -0.0}, {"top_k": 1}, {"temperature": 5e-324}, {"top_p": 5e-324})
    texts = {post(server, PLAIN, {"prompt": "def", "max_tokens": 40} | way)[1]["choices"][0]["text"] for way in ways}
    assert len(texts) == 1


def test_absurd_counts_of_answers_cost_no_memory(server):
    def resident():
        pids = (server.process.pid, *server.children())
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    assert post(server, PLAIN, {"prompt": "x", "n": 16, "max_tokens": 1})[0] == 200
    before = resident()
    for count in (0, 17, 16384, 10**9, 2**63 - 1):
        assert_refused(post(server, PLAIN, {"prompt": "x", "n": count}), 400, "n")
        assert_refused(post(server, CHAT, {"messages": HELLO, "n": count}), 400, "n")
    for prompts, count in ((128, 2), (64, 3), (9, 15)):
        assert_refused(post(server, PLAIN, {"prompt": ["x"] * prompts, "n": count}), 400, "prompt")
    assert resident() - before < 20 * 1024


def test_a_bias_names_tokens_of_the_vocabulary_and_is_bounded(server, folder):
    vocabulary = Tokenizer.from_folder(folder).vocab_size
    refused = [
        {str(vocabulary): 1},
        {"-1": 1},
        {"abc": 1},
        {"": 1},
        {"1.5": 1},
        {" 5": 1},
        {"٥": 1},
        {"1" * 100: 1},
        {"5": 100.5},
        {"5": -101},
        {str(token): 1 for token in range(100_000)},
    ]
    for bias in refused:
        status, body = post(server, CHAT, FINE[CHAT] | {"logit_bias": bias})
        assert_refused((status, body), 400)
        assert body["error"]["param"].split(".")[0] == "logit_bias"
    for bias in ({"5": 100}, {"5": -100}, {str(vocabulary - 1): 0}, {}, {"5": 100, "05": 1}):
        assert post(server, CHAT, FINE[CHAT] | {"logit_bias": bias})[0] == 200
    for value in (-100, 100):  # the same for every token is the same as none
        bias = {str(token): value for token in range(vocabulary)}
        answers = [
            post(server, PLAIN, {"prompt": "x", "max_tokens": 9, "temperature": 0} | more)[1]["choices"][0]["text"]
            for more in ({}, {"logit_bias": bias})
        ]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_a_token_that_ends_an_answer_is_one_of_the_vocabulary(path, server, folder):
    vocabulary = Tokenizer.from_folder(folder).vocab_size
    for more in ({}, {"min_tokens": 1}):
        status, body = post(server, path, FINE[path] | {"stop_token_ids": [5, vocabulary]} | more)
        assert_refused((status, body), 400)
        assert body["error"]["param"] == "stop_token_ids"
        assert post(server, path, FINE[path] | {"stop_token_ids": [vocabulary - 1]} | more)[0] == 200


@pytest.mark.parametrize(
    "prompt",
    [[], [-1], [10**6], [2**31], [2**70], [[]], [[1], "x"], [1, "x"], [True], [[[1]]], [1.5], {}, None, [None],
     ["a"] * 129, [[1]] * 129, [5] * 10**6, "x" * 2**19],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_prompts_that_cannot_be_are_a_400(server, prompt):
    status, body = post(server, PLAIN, {"prompt": prompt, "max_tokens": 2})
    assert_refused((status, body), 400)
    assert body["error"]["param"].split(".")[0] == "prompt"


def test_a_prompt_of_its_first_token_alone_can_be_gone_on_from(server, folder):
    bos = Tokenizer.from_folder(folder).bos_id
    answers = [post(server, PLAIN, {"prompt": one, "temperature": 0})[1] for one in ("", [bos], [[bos]])]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [1, 1, 1]


@pytest.mark.parametrize("tokens", [2045, 2046, 2047])
def test_the_longest_context_is_exact(server, tokens):
    prompt = {"prompt": [5] * tokens, "ignore_eos": True}
    room = 2048 - tokens
    status, body = post(server, PLAIN, prompt | {"max_tokens": room})
    assert status == 200
    assert body["usage"] == body["usage"] | {"prompt_tokens": tokens, "total_tokens": 2048}
    assert post(server, PLAIN, prompt)[1]["usage"]["total_tokens"] == 2048  # the default goes as far as there is room
    assert_refused(post(server, PLAIN, prompt | {"max_tokens": room + 1}), 400, "prompt", "context_length_exceeded")


def test_a_prompt_that_leaves_no_room_is_told_so(server):
    for prompt in ([5] * 2048, [5] * 2049, "a b" * 9000):
        assert_refused(post(server, PLAIN, {"prompt": prompt}), 400, "prompt", "context_length_exceeded")
    message = post(server, PLAIN, {"prompt": [5] * 2040, "max_tokens": 9})[1]["error"]["message"]
    assert message == (
        "This model's maximum context length is 2048 tokens. However, the prompt has 2040, and max_tokens is 9."
    )
    long = [{"role": "user", "content": "a b" * 9000}]
    assert_refused(post(server, CHAT, {"messages": long}), 400, "messages", "context_length_exceeded")
    assert_refused(
        post(server, CHAT, {"messages": HELLO, "max_tokens": 2048}), 400, "messages", "context_length_exceeded"
    )

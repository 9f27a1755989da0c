"""Forms that could take for ever cost their sender a refusal, and valid ones always hold."""

from __future__ import annotations

import asyncio
import json
import threading

import openai
import pytest

from tests.serve.marked import END_OF_THOUGHT
from tests.serve.speaking import CHAT, HELLO, PLAIN, assert_refused, post

LOOPS = {
    "itself": {"$ref": "#"},
    "itself in all": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "itself in any": {"anyOf": [{"$ref": "#"}]},
    "two of each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "its own other properties": {"type": "object", "additionalProperties": {"$ref": "#"}},
    "its own items": {"type": "array", "items": {"$ref": "#"}, "minItems": 3},
    "its own required property": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "nowhere": {"$ref": "#/$defs/none"},
    "another machine": {"$ref": "http://127.0.0.1/x.json"},
    "a file": {"$ref": "file:///etc/passwd"},
}
BIG = {
    "a long enum": {"enum": list(range(10_000))},
    "many properties": {"type": "object", "properties": {f"p{place}": {"type": "string"} for place in range(1500)}},
    "a long text": {"description": "x" * 70_000},
    "many items": {"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**9},
    "a long string": {"type": "string", "minLength": 10**8},
    "a wide range": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "many choices of many": {"oneOf": [{"anyOf": [{"const": place}] * 10} for place in range(60)]},
    "a pattern of repetitions": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "no such type": {"type": "nonsense"},
    "a broken pattern": {"type": "string", "pattern": "("},
    "false": {"not": {}},
}
REGEXES = [
    "(a+)+$",
    "a{100000}",
    "a{100000}{100000}",
    "(((((a{9}){9}){9}){9}){9}){9}",
    "(a|aa)+$",
    "(.*a){40}",
    "(?=a)b",
    "(a)\\1",
    "[",
    "a**",
    "(" * 500 + ")" * 500,
]
GRAMMARS = [
    "start: start start",
    "start: a\na: b\nb: a",
    "start: nothing",
    "start: /(a+)+$/",
    "not lark at all {{{",
    'start: "a"{1000000}',
]


def bombs():
    return (
        [{"json": schema} for schema in (*LOOPS.values(), *BIG.values())]
        + [{"regex": text} for text in REGEXES]
        + [{"grammar": text} for text in GRAMMARS]
    )


def test_forms_that_could_take_for_ever_are_answered_and_a_stream_beside_them_goes_on(server):
    assert len(bombs()) >= 30
    read = []

    def stream():
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            more = {"ignore_eos": True}
            for chunk in client.completions.create(
                model="tiny", prompt="def", max_tokens=1500, stream=True, extra_body=more
            ):
                read.append(chunk.choices[0].finish_reason)

    thread = threading.Thread(target=stream)
    thread.start()
    for form in bombs():
        status, body = post(server, PLAIN, {"prompt": "x", "max_tokens": 2, "structured_outputs": form})
        assert status in (200, 400), (str(form)[:200], body)
        if status == 400:
            assert_refused((status, body), 400)
    thread.join(120)
    assert read[-1] == "length"
    assert post(server, PLAIN, {"prompt": "x", "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("name", ["nowhere", "another machine", "a file"])
def test_a_schema_refers_to_nothing_outside_itself(server, name):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOPS[name]}}
    answer = post(server, CHAT, {"messages": HELLO, "response_format": format_})
    assert_refused(answer, 400, "response_format.json_schema.schema", "invalid_schema")


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}


def assert_valid(text):
    value = json.loads(text)
    assert set(value) == {"city", "days", "tags"}
    assert value["city"] in ("Rome", "Oslo")
    assert isinstance(value["days"], int)
    assert 1 <= value["days"] <= 9
    assert len(value["tags"]) <= 2
    assert all(isinstance(tag, str) and len(tag) <= 4 for tag in value["tags"])


async def bound_answers(url, count, concurrency, temperature, thinking):
    """How many of `count` answers bound to the schema ended, after each was found valid; a third of them calls."""
    turn = asyncio.Semaphore(concurrency)
    more = {"chat_template_kwargs": {"thinking": thinking}}
    if thinking:
        more["logit_bias"] = {END_OF_THOUGHT: 4}
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    call = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}

    async def one(client, seed):
        async with turn:
            answer = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": f"def add{seed}"}],
                seed=seed,
                temperature=temperature,
                max_tokens=400,
                extra_body=more,
                **(call if seed % 3 == 0 else {"response_format": format_}),
            )
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            return 0
        assert_valid(choice.message.tool_calls[0].function.arguments if seed % 3 == 0 else choice.message.content)
        return 1

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        return sum(await asyncio.gather(*(one(client, seed) for seed in range(count))))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "drafts"])
def address(request, start, tmp_path_factory):
    """Of a server with or without drafts, whose model knows marks of thought and calls."""
    from tests.serve.marked import save_marked

    path = tmp_path_factory.mktemp("forms")
    save_marked(path, "V3.1")
    server = start(*(["--speculative"] if request.param else []), "--num-blocks", "512", model=path).wait_until_ready()
    yield f"{server.url}/v1"
    server.stop()


@pytest.mark.parametrize("thinking", [False, True], ids=["answer", "thought"])
def test_bound_answers_that_end_are_valid(address, thinking):
    for temperature in (0, 1):
        assert asyncio.run(bound_answers(address, 6, 6, temperature, thinking)) >= 3


@pytest.mark.long
@pytest.mark.parametrize("concurrency", [1, 8, 32])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("thinking", [False, True], ids=["answer", "thought"])
def test_fifty_bound_answers_that_end_are_valid(address, thinking, temperature, concurrency):
    ended = asyncio.run(bound_answers(address, 50, concurrency, temperature, thinking))
    assert ended >= 40

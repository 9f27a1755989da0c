"""Tools, thought and forms together, over HTTP, with a model that knows DeepSeek-V3.1's marks."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.serve.marked import END_OF_THOUGHT

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "?", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
HELLO = [{"role": "user", "content": "def add"}]


@pytest.fixture(scope="module", params=["V3.1", "V3"])
def client(request, marked):
    return marked(request.param)


def chat(client, **options):
    return client.chat.completions.create(model="tiny", messages=HELLO, **({"max_tokens": 300} | options))


def assert_is_call(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Rome", "Oslo")
    else:
        assert call.function.name == "now"
        assert isinstance(arguments, dict)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_named_tool_is_called_as_its_schema_says(client, temperature, thinking):
    answer = chat(
        client,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=temperature,
        seed=1,
        logit_bias={END_OF_THOUGHT: 5} if thinking else {},
        extra_body={"chat_template_kwargs": {"thinking": thinking}},
    ).choices[0]
    if answer.finish_reason == "length":
        assert thinking
        assert answer.message.reasoning_content == answer.message.reasoning
        return
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.id.startswith("call_")
    assert_is_call(call)


@pytest.mark.parametrize("seed", range(2))
def test_required_tools_streamed_are_those_of_the_whole_answer(client, seed):
    options = {"tools": TOOLS[:1], "tool_choice": "required", "seed": seed, "max_tokens": 200}
    whole = chat(client, **options).choices[0]
    wanted = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    for call in whole.message.tool_calls:
        if whole.finish_reason == "tool_calls":
            assert_is_call(call)
    calls, reason = [], None
    for chunk in chat(client, **options, stream=True):
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        assert not choice.delta.content
        for piece in choice.delta.tool_calls or []:
            if piece.id is not None:
                assert piece.index == len(calls)
                calls.append([piece.function.name, ""])
            calls[piece.index][1] += piece.function.arguments
    assert [tuple(call) for call in calls] == wanted
    assert reason == whole.finish_reason


def test_at_most_one_call_where_they_may_not_be_parallel(client):
    answer = chat(client, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False, seed=3)
    assert len(answer.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_binds_the_answer_behind_a_thought(client, temperature):
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    for seed in range(3):
        choice = chat(
            client,
            response_format=format_,
            temperature=temperature,
            seed=seed,
            max_tokens=600,
            logit_bias={END_OF_THOUGHT: 4},
            extra_body={"chat_template_kwargs": {"thinking": True}},
        ).choices[0]
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content)) == {"city", "days"}
        else:
            assert not choice.message.content


@pytest.mark.parametrize("thinking", [False, True])
def test_sixteen_bound_answers_at_once_are_all_valid_with_drafts(client, thinking):
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    call = {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False}
    more = {"logit_bias": {END_OF_THOUGHT: 4}, "chat_template_kwargs": {"thinking": thinking}}

    async def one(many, seed):
        answer = await many.chat.completions.create(
            model="tiny",
            messages=HELLO,
            seed=seed,
            temperature=seed % 4 // 2,
            max_tokens=600,
            extra_body=more,
            **(call if seed % 2 else {"response_format": format_}),
        )
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            return None
        text = choice.message.tool_calls[0].function.arguments if seed % 2 else choice.message.content
        return set(json.loads(text))

    async def all_at_once():
        url = str(client.base_url)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as many:
            return await asyncio.gather(*(one(many, seed) for seed in range(16)))

    found = asyncio.run(all_at_once())
    assert found.count({"city", "days"}) >= 12
    assert all(one in (None, {"city", "days"}) for one in found)


def test_a_thought_is_told_apart_and_counted(client):
    extra = {"chat_template_kwargs": {"thinking": True}, "logit_bias": {END_OF_THOUGHT: -100}}
    answer = chat(client, max_tokens=20, seed=2, extra_body=extra)
    assert answer.choices[0].message.reasoning_content == answer.choices[0].message.reasoning != ""
    assert answer.usage.completion_tokens_details.reasoning_tokens == 20
    for chunk in chat(client, max_tokens=20, seed=2, extra_body=extra, stream=True):
        delta = chunk.choices[0].delta
        assert not (delta.content and getattr(delta, "reasoning_content", None))


def test_a_conversation_with_calls_and_results_goes_on(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=3)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [TOOLS[1]] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
    ],
)
def test_tools_that_cannot_be_are_a_400(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.param == param

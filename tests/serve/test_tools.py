"""Tools, thought and forms together, over HTTP, with a model that knows DeepSeek-V3.1's marks."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.serve.marked import BEGIN_CALLS, END_OF_THOUGHT

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


STRICT = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_strict_tool_keeps_its_schema_where_the_model_may_call_it(client, temperature, thinking):
    template = {"chat_template_kwargs": {"thinking": thinking}}
    bias = {BEGIN_CALLS: 100, END_OF_THOUGHT: 100}  # behind its thought it calls, or begins by calling
    answer = chat(client, tools=STRICT, logit_bias=bias, temperature=temperature, seed=1, extra_body=template)
    calls = answer.choices[0].message.tool_calls
    assert calls[0].function.name in ("weather", "now")
    for call in calls if answer.choices[0].finish_reason == "tool_calls" else calls[:-1]:
        assert_is_call(call)
    bias = {BEGIN_CALLS: -100, END_OF_THOUGHT: 100}
    answer = chat(client, tools=STRICT, logit_bias=bias, temperature=1, seed=1, max_tokens=20, extra_body=template)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


def test_only_allowed_tools_are_called(client):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = chat(client, tools=TOOLS, tool_choice=choice, logit_bias={BEGIN_CALLS: 100}, seed=1, max_tokens=600)
    assert {call.function.name for call in answer.choices[0].message.tool_calls} == {"now"}


@pytest.mark.parametrize("calls", [False, True])
def test_an_answer_of_a_form_may_be_a_call_where_there_are_tools(client, calls):
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    answer = chat(
        client,
        tools=STRICT,
        response_format=format_,
        logit_bias={BEGIN_CALLS: 100 if calls else -100},
        seed=1,
        max_tokens=100,
    ).choices[0]
    if calls:
        assert answer.message.content is None
        assert answer.message.tool_calls
    else:
        assert answer.finish_reason == "stop"
        assert set(json.loads(answer.message.content)) == {"city", "days"}


@pytest.mark.parametrize("effort", ["none", "minimal", "max"])
def test_every_effort_but_none_lets_the_model_think(client, effort):
    answer = chat(client, max_tokens=4, seed=2, logit_bias={END_OF_THOUGHT: -100}, reasoning_effort=effort)
    assert hasattr(answer.choices[0].message, "reasoning_content") == (effort != "none")


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
        ({"reasoning_effort": "none", "extra_body": {"chat_template_kwargs": {"thinking": True}}}, "reasoning_effort"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "chat_template_kwargs.enable_thinking"),
        (
            {"extra_body": {"structured_outputs": {"grammar": 'start: "a"'}}, "tools": TOOLS},
            "structured_outputs.grammar",
        ),
    ],
)
def test_tools_that_cannot_be_are_a_400(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.param == param


@pytest.mark.parametrize(("regex", "text"), [("a/b", "a/b"), (r"a\/b", "a/b"), ("a\nb", "a\nb"), ("a\\\nb", "a\nb")])
def test_an_expression_with_slashes_and_lines_binds_an_answer_beside_tools(client, regex, text):
    body = {"structured_outputs": {"regex": regex}, "logit_bias": {BEGIN_CALLS: -100}}
    assert chat(client, tools=TOOLS, extra_body=body).choices[0].message.content == text

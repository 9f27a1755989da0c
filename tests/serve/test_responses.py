"""POST /v1/responses as OpenAI's client uses it, which checks the shape of every answer and the order of events."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.serve.marked import END_OF_THOUGHT
from tests.serve.test_hostile_input import assert_refused, post
from tests.serve.test_tools import SCHEMA
from tests.serve.test_tools import TOOLS as CHAT_TOOLS

PATH = "/v1/responses"
TOOLS = [{"type": "function", "strict": False, "parameters": None, **tool["function"]} for tool in CHAT_TOOLS]
FORMAT = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA, "strict": True}}


class Trip(BaseModel):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


def respond(client, **options):
    return client.responses.create(model="tiny", **({"input": "def add", "max_output_tokens": 12} | options))


def seeded(seed, **more):
    return {"extra_body": {"seed": seed, **more}}


def contents(response):
    """What a response says, without the ids that differ from one to the next."""
    return [one.model_dump(exclude={"id", "call_id"}) for one in response.output]


def test_a_response_is_the_answer_of_a_chat(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=3)
    response = respond(client, instructions="Be brief.", metadata={"a": "b"}, user="eve", **seeded(3))
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert (response.metadata, response.user, response.instructions) == ({"a": "b"}, "eve", "Be brief.")
    assert (response.temperature, response.truncation, response.tool_choice) == (1.0, "disabled", "auto")


def test_the_client_s_shortest_call_answers(client):
    response = client.responses.create(model="tiny", input="def add", extra_body={"stop": "e", "seed": 1})
    assert response.status == "completed"
    assert response.completed_at >= response.created_at
    assert response.output[0].status == "completed"
    assert "e" not in response.output_text


def test_items_are_the_messages_of_a_chat(client):
    conversation = [("developer", "Be brief."), ("user", "def"), ("assistant", "add"), ("user", "x")]
    messages = [{"role": role, "content": text} for role, text in conversation]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=4)
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "def"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "add", "annotations": []}],
        },
        {"role": "user", "content": "x"},
    ]
    response = respond(client, input=items, max_output_tokens=8, **seeded(4))
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def test_what_a_response_gave_goes_back_in_as_it_is(client):
    first = respond(client, top_logprobs=1, **seeded(2))
    items = [{"role": "user", "content": "def add"}, *first.output, {"role": "user", "content": "and"}]
    second = respond(client, input=items, **seeded(2))
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.output_tokens == 12


def test_a_stream_tells_the_whole_response_in_numbered_events(client):
    options = {"top_logprobs": 2, "max_output_tokens": 20, **seeded(5)}
    whole = respond(client, **options)
    events = list(respond(client, stream=True, **options))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type.removeprefix("response.") for one in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    last = events[-1].response
    assert contents(last) == contents(whole)
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert "".join(one.delta for one in events[4:-4]) == whole.output_text == events[-4].text
    assert {one.response.id for one in (events[0], events[1], events[-1])} == {last.id}


def test_the_events_have_lines_that_name_them_and_no_other_end(client):
    with client.responses.with_streaming_response.create(
        model="tiny", input="def", max_output_tokens=2, stream=True
    ) as response:
        lines = list(response.iter_lines())
    named = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert named == [one["type"] for one in data]
    assert named[-1] == "response.incomplete"


def test_logprobs_are_those_of_the_text(client):
    text = respond(client, include=["message.output_text.logprobs"], **seeded(7)).output[0].content[0]
    assert b"".join(bytes(one.bytes) for one in text.logprobs).decode(errors="replace") == text.text
    assert text.logprobs[0].top_logprobs == []
    text = respond(client, top_logprobs=3, **seeded(7)).output[0].content[0]
    assert all(len(one.top_logprobs) == 3 for one in text.logprobs)
    assert respond(client).output[0].content[0].logprobs == []


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_binds_the_text_and_the_client_parses_it(client, temperature):
    parsed = client.responses.parse(
        model="tiny", input="def", text_format=Trip, temperature=temperature, max_output_tokens=200, **seeded(1)
    )
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Trip)
    with client.responses.stream(
        model="tiny", input="def", text_format=Trip, temperature=temperature, max_output_tokens=200, **seeded(1)
    ) as stream:
        snapshots = [one.snapshot for one in stream if one.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    assert snapshots[-1] == final.output_text == parsed.output_text


def test_an_object_is_the_other_form(client):
    response = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=300, **seeded(2))
    assert response.output_text.startswith("{")
    assert response.text.format.type == "json_object"


@pytest.mark.parametrize("form", ["V3.1", "V3"])
def test_a_function_is_called_streamed_as_whole(marked, form):
    options = {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 300,
        **seeded(1),
    }
    whole = respond(marked(form), **options)
    (call,) = whole.output
    assert whole.status == "completed"
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    with marked(form).responses.stream(model="tiny", input="def add", **options) as stream:
        deltas = [one.delta for one in stream if one.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output[0].arguments
    assert contents(final)[0]["arguments"] == call.arguments


def test_calls_and_what_they_gave_go_back_in(marked):
    client = marked("V3.1")
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    first = respond(
        client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200, **seeded(1)
    )
    (call,) = first.output
    assert call.name == "now"
    items = [
        {"role": "user", "content": "def"},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
    ]
    assert respond(client, input=items, tools=TOOLS, **seeded(2, ignore_eos=True)).usage.output_tokens == 12


def test_a_thought_is_an_item_and_effort_none_leaves_it_out(marked):
    client = marked("V3.1")
    extra = {"extra_body": {"seed": 2, "logit_bias": {END_OF_THOUGHT: -100}}}
    response = respond(client, reasoning={"effort": "high"}, **extra)
    (thought,) = response.output
    assert (thought.type, thought.summary, thought.status) == ("reasoning", [], "incomplete")
    assert response.usage.output_tokens_details.reasoning_tokens == 12
    assert response.reasoning.effort == "high"
    kinds = [one.type for one in respond(client, reasoning={"effort": "high"}, stream=True, **extra)]
    assert "response.reasoning_text.delta" in kinds
    assert "response.output_text.delta" not in kinds
    response = respond(client, reasoning={"effort": "none"}, **extra)
    assert [one.type for one in response.output] == ["message"]
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    back = [{"role": "user", "content": "def"}, thought, {"role": "user", "content": "x"}]
    assert respond(client, input=back, **seeded(2, ignore_eos=True)).usage.output_tokens == 12


def test_the_text_behind_a_thought_keeps_its_form_and_its_logprobs(marked):
    client, spoken = marked("V3.1"), 0
    for seed in range(4):
        response = respond(
            client,
            text=FORMAT,
            reasoning={"effort": "low"},
            max_output_tokens=600,
            include=["message.output_text.logprobs"],
            extra_body={"seed": seed, "logit_bias": {END_OF_THOUGHT: 4}},
        )
        if response.status == "completed":
            text = response.output[-1].content[0]
            assert set(json.loads(text.text)) == {"city", "days"}
            assert b"".join(bytes(one.bytes) for one in text.logprobs).decode().strip() == text.text
            spoken += 1
    assert spoken


REFUSED = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"include": ["file_search_call.results"]}, "include.0"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}}, "text.format.schema"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "input"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"temperature": "1"}, "temperature"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": "x"}] * 2049}, "input"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_a_400_that_names_it(server, changes, param):
    assert_refused(post(server, PATH, {"input": "def", **changes}), 400, param)


def test_no_response_is_kept(client):
    response = respond(client)
    with pytest.raises(openai.NotFoundError, match="this server keeps none"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(response.id)

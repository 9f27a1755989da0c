"""The items of a response's input become the messages that a chat would have sent."""

from __future__ import annotations

import pytest

from benthic.config.serve import Limits
from benthic.serve.body import validated
from benthic.serve.refusal import Refusal
from benthic.serve.response_input import choice_of_response, messages_of, tools_of
from benthic.serve.response_requests import ResponsesRequest
from benthic.serve.sampling import form_of_text
from benthic.serve.toolbox import Choice


def asked(**fields):
    return validated({"input": "x", **fields}, ResponsesRequest)


def messages(*items, **fields):
    return [one.model_dump(exclude_none=True) for one in messages_of(asked(input=list(items), **fields))]


def call(number):
    return {"type": "function_call", "call_id": f"call_{number}", "name": "now", "arguments": "{}"}


def called(number):
    return {"id": f"call_{number}", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def gave(number):
    return {"type": "function_call_output", "call_id": f"call_{number}", "output": "noon"}


THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def test_what_the_model_thought_said_and_called_in_a_row_is_one_message():
    user = {"role": "user", "content": "time?"}
    said = {"role": "assistant", "content": "Let me see."}
    found = messages(user, THOUGHT, said, call(1), call(2), gave(1), gave(2), THOUGHT, call(3), gave(3))
    assert found == [
        user,
        said | {"reasoning_content": "hm", "tool_calls": [called(1), called(2)]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
        {"role": "assistant", "reasoning_content": "hm", "tool_calls": [called(3)]},
        {"role": "tool", "tool_call_id": "call_3", "content": "noon"},
    ]


def test_two_answers_in_a_row_stay_two_and_instructions_come_first():
    said = {"role": "assistant", "content": "a"}
    assert messages(said, said, THOUGHT, instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        said,
        said,
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]


def test_tools_and_choices_are_those_of_a_chat():
    (tool,) = tools_of(asked(tools=[{"type": "function", "name": "f", "strict": True}]).tools)
    assert tool.model_dump(exclude_none=True) == {"type": "function", "function": {"name": "f", "strict": True}}
    named = {"type": "function", "name": "f"}
    assert choice_of_response(asked(tool_choice=named)) == Choice("required", ("f",), one_only=True)
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    assert choice_of_response(asked(tool_choice=allowed)) == Choice("auto", ("f",))
    assert choice_of_response(asked(parallel_tool_calls=False)) == Choice(one_only=True)


def test_a_summary_of_a_thought_is_not_taken_back():
    with pytest.raises(Refusal, match="at most 0 items") as caught:
        messages(THOUGHT | {"summary": [{"type": "summary_text", "text": "hm"}]})
    assert caught.value.param == "input.0.summary"


def test_a_schema_needs_its_name():
    text = asked(text={"format": {"type": "json_schema", "schema": {}}}).text
    with pytest.raises(Refusal, match=r"needs text\.format\.name"):
        form_of_text(text.format, Limits())

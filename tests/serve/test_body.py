"""A body is read at a cost that its size bounds, whatever is wrong in it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from benthic.config.serve import Limits
from benthic.serve.body import parse, validated
from benthic.serve.refusal import Refusal
from benthic.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from benthic.serve.response_requests import ResponsesRequest

HELLO = [{"role": "user", "content": "x"}]
MANY = 100_000


@pytest.mark.parametrize(
    ("model", "value"),
    [
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
        (ChatRequest, {"messages": HELLO, "tools": [1] * MANY}),
        (ChatRequest, {"messages": HELLO, "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": ["", 1] * MANY}),
        (CompletionRequest, {"prompt": [[None]] * MANY}),
        (TokenizeRequest, {"messages": [1] * MANY}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
        (ResponsesRequest, {"input": [1] * MANY}),
        (ResponsesRequest, {"input": "x", "tools": [1] * MANY}),
    ],
    ids=lambda one: getattr(one, "__name__", "-".join(one) if isinstance(one, dict) else None),
)
def test_a_list_of_faults_costs_as_much_as_one(model, value):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    assert caught.value.error_count() < 10
    with pytest.raises(Refusal) as refused:
        validated(value, model)
    assert refused.value.param.split(".")[0] in value


def test_of_too_many_unknown_names_only_the_number_is_told():
    with pytest.raises(Refusal, match="the body has 5000 faults"):
        validated({"messages": HELLO} | {f"x{one}": 1 for one in range(5000)}, ChatRequest)


def test_a_place_in_a_prompt_is_told_without_the_types_that_were_tried():
    with pytest.raises(Refusal) as caught:
        validated({"prompt": [True]}, CompletionRequest)
    assert caught.value.param == "prompt.0"


def test_a_number_beyond_all_floats_is_refused_even_where_anything_may_stand():
    with pytest.raises(Refusal, match="1e400 is too large"):
        parse(b'{"tools": [{"parameters": {"maximum": 1e400}}]}', Limits())

"""A response that fails on the way says so in its last event."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

from benthic.serve.messages import Delta, Sampling
from benthic.serve.question import Begun, Question
from benthic.serve.refusal import unavailable
from benthic.serve.response_requests import ResponsesRequest
from benthic.serve.responses import ResponseJob
from benthic.serve.toolbox import Toolbox
from benthic.text import train_tokenizer


class Failing:
    """An engine that dies behind its first tokens."""

    def __init__(self, tokens):
        self._tokens = tokens

    async def deltas(self):
        yield Delta(0, 0, self._tokens, "def")
        raise unavailable("the engine failed", "engine_failed")


def test_a_stream_that_fails_tells_what_it_has_and_why_it_ends():
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)
    generation = Failing(tokenizer.encode("def"))
    service = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(model_name="tiny"))
    question = Question([], "input", Toolbox(tokenizer), None, {})
    begun = Begun(tokenizer.encode("x"), Sampling(max_tokens=9), generation)
    job = ResponseJob(ResponsesRequest(input="x"), service, begun, question)

    async def collect():
        return [one async for one in job.events(generation)]

    events = [json.loads(one.partition(b"data: ")[2]) for one in asyncio.run(collect())]
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert events[-2]["item"]["status"] == "incomplete"
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the engine failed"}
    assert last["response"]["output"][0]["content"][0]["text"] == "def"
    assert last["response"]["completed_at"] is None

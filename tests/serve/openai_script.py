"""What people do with OpenAI's client, under whatever version of it runs this: `python openai_script.py URL`.

Every answer's shape is checked by the client itself. Prints one line of JSON: the version, and how often what was done.
A server of tests/serve/marked.py answers, named tiny.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from enum import Enum

import openai
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "def add"}]
TASKS = 256
DONE: Counter[str] = Counter()


class City(Enum):
    """Where."""

    ROME = "Rome"
    OSLO = "Oslo"


class Weather(BaseModel):
    """What a parsed answer is."""

    city: City
    is_dry: bool


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "?", "parameters": SCHEMA}}


def chats(client: openai.OpenAI) -> None:
    """Whole, streamed, and through the helper that puts streams together."""
    for options in ({}, {"n": 3}, {"logprobs": True, "top_logprobs": 4}, {"stop": ["e"]}, {"temperature": 0}):
        asked = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 30, **options}
        whole = client.chat.completions.create(**asked)
        texts, logprobs = [""] * len(whole.choices), [[] for _ in whole.choices]
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        assert texts == [choice.message.content for choice in whole.choices]
        assert usage.completion_tokens == whole.usage.completion_tokens
        assert usage.completion_tokens_details is not None
        if "logprobs" in options:
            assert logprobs[0] == whole.choices[0].logprobs.content
            assert all(len(one.top_logprobs) == 4 for one in logprobs[0])
        with client.chat.completions.stream(**{k: v for k, v in asked.items() if k != "n"}) as stream:
            kinds = Counter(event.type for event in stream)
            final = stream.current_completion_snapshot
        assert final.choices[0].message.content == texts[0]
        assert kinds["content.done"] == 1
        DONE["chat"] += 3


def completions(client: openai.OpenAI) -> None:
    """Of several prompts, of token ids, streamed."""
    # The client's types know no null of finish_reason, which OpenAI sends in all chunks but the last.
    lenient = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0)
    for prompt in ("def", ["def", "ret"], [5, 6], [[5, 6], [7]]):
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "seed": 2}
        whole = client.completions.create(**asked)
        texts = [""] * len(whole.choices)
        for chunk in lenient.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        DONE["completion"] += 2
    lenient.close()


def parsed(client: openai.OpenAI) -> None:
    """Answers as pydantic models, by both endpoints, and streamed."""
    for seed in range(5):
        asked = {"model": "tiny", "messages": HELLO, "response_format": Weather, "seed": seed, "max_tokens": 200}
        answer = client.chat.completions.parse(**asked).choices[0].message.parsed
        assert isinstance(answer, Weather)
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == answer
        response = client.responses.parse(
            model="tiny", input="def add", text_format=Weather, max_output_tokens=200, extra_body={"seed": seed}
        )
        assert isinstance(response.output_parsed, Weather)
        DONE["parse"] += 3


def tools(client: openai.OpenAI) -> None:
    """Calls, whole and streamed, strict and required, by both endpoints."""
    for seed in range(5):
        asked = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "tool_choice": "required", "seed": seed}
        asked |= {"parallel_tool_calls": False, "max_tokens": 300}
        (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
        assert set(json.loads(call.function.arguments)) == {"city", "days"}
        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert (streamed.function.name, streamed.function.arguments) == ("weather", call.function.arguments)
        response = client.responses.create(
            model="tiny",
            input="def add",
            tools=[{"type": "function", "strict": True, **TOOL["function"]}],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=300,
            extra_body={"seed": seed},
        )
        (item,) = (one for one in response.output if one.type == "function_call")
        assert set(json.loads(item.arguments)) == {"city", "days"}
        DONE["tools"] += 3


def responses(client: openai.OpenAI) -> None:
    """Whole, and streamed through the helper that asserts the order of events."""
    for seed in range(5):
        asked = {"model": "tiny", "input": "def add", "max_output_tokens": 30, "extra_body": {"seed": seed}}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            told = list(stream)
        assert [event.sequence_number for event in told] == list(range(len(told)))
        assert told[-1].response.output_text == whole.output_text
        events = list(client.responses.create(**asked, stream=True))
        assert events[0].type == "response.created"
        assert events[-1].type in ("response.completed", "response.incomplete")
        DONE["responses"] += 3


def errors(client: openai.OpenAI) -> None:
    """Each mistake is the exception that the client has for it."""
    for kind, call in (
        (openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4", messages=HELLO)),
        (openai.NotFoundError, lambda: client.models.retrieve("gpt-4")),
        (openai.NotFoundError, lambda: client.responses.retrieve("resp_1")),
        (openai.BadRequestError, lambda: client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)),
        (openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt=[-1])),
        (openai.BadRequestError, lambda: client.responses.create(model="tiny", input="x", temperature=3)),
        (
            openai.BadRequestError,
            lambda: client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=99),
        ),
        (openai.InternalServerError, lambda: client.embeddings.create(model="tiny", input="x")),
        (openai.NotFoundError, lambda: client.files.list()),
    ):
        try:
            call()
        except kind as error:
            told = bool(error.body["message"] and error.request_id)
        else:
            told = False
        assert told, kind
        DONE["errors"] += 1
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=2)
    assert raw.headers["x-request-id"]
    assert raw.parse().usage.completion_tokens == 2


async def crowd(url: str) -> None:
    """Many tasks at once: chats, completions and responses, streamed and whole; each gets its own answer."""
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=300, _strict_response_validation=True
    ) as client:

        async def chat(seed: int, stream: bool) -> str:
            asked = {"model": "tiny", "messages": HELLO, "seed": seed, "max_tokens": 24}
            if not stream:
                return (await client.chat.completions.create(**asked)).choices[0].message.content
            text = ""
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                text += chunk.choices[0].delta.content or ""
            return text

        async def response(seed: int, stream: bool) -> str:
            asked = {"model": "tiny", "input": "def add", "max_output_tokens": 24, "extra_body": {"seed": seed}}
            if not stream:
                return (await client.responses.create(**asked)).output_text
            async with client.responses.stream(**asked) as events:
                return [event async for event in events][-1].response.output_text

        alone = {(kind, seed): await kind(seed, False) for kind in (chat, response) for seed in range(8)}
        wanted = [(kind, seed % 8, bool(seed & 8)) for seed in range(TASKS // 2) for kind in (chat, response)]
        found = await asyncio.gather(*(kind(seed, stream) for kind, seed, stream in wanted))
        assert found == [alone[kind, seed] for kind, seed, _ in wanted]
    DONE["at once"] += len(found)


def main(url: str) -> None:
    """All of it."""
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=120, _strict_response_validation=True
    ) as client:
        assert client.models.list().data[0].id == "tiny"
        for one in (chats, completions, parsed, tools, responses, errors):
            one(client)
    asyncio.run(crowd(url))
    print(json.dumps({"version": openai.__version__, **DONE}))


if __name__ == "__main__":
    main(sys.argv[1])

"""What litellm's users do: `python litellm_script.py URL`. Prints one line of JSON: how often what was done."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices from the network

import litellm

HELLO = [{"role": "user", "content": "def add"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def main(url: str) -> None:
    """All of it."""
    litellm.telemetry = False
    done: Counter[str] = Counter()
    asked = {"model": "openai/tiny", "messages": HELLO, "api_base": url, "api_key": "none", "max_retries": 0}
    asked |= {"timeout": 120}
    for seed in range(4):
        whole = litellm.completion(**asked, seed=seed, max_tokens=30)
        text = ""
        chunks = list(
            litellm.completion(**asked, seed=seed, max_tokens=30, stream=True, stream_options={"include_usage": True})
        )
        for chunk in chunks:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        assert text == whole.choices[0].message.content
        assert whole.usage.completion_tokens == 30
        assert litellm.stream_chunk_builder(chunks, messages=HELLO).usage.completion_tokens == 30
        done["chat"] += 2
        schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
        bound = litellm.completion(**asked, seed=seed, max_tokens=300, response_format=schema)
        assert set(json.loads(bound.choices[0].message.content)) == {"city", "days"}
        tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
        called = litellm.completion(**asked, seed=seed, max_tokens=300, tools=[tool], tool_choice="required", n=1)
        for call in called.choices[0].message.tool_calls:
            if called.choices[0].finish_reason == "tool_calls":
                assert set(json.loads(call.function.arguments)) == {"city", "days"}
        done["bound"] += 2
        thought = litellm.completion(
            **asked, seed=seed, max_tokens=20, extra_body={"chat_template_kwargs": {"thinking": True}}
        )
        assert thought.choices[0].message.reasoning_content
        done["thought"] += 1
        plain = litellm.text_completion(
            model="text-completion-openai/tiny", prompt="def", api_base=url, api_key="none", max_tokens=5
        )
        assert plain.usage.completion_tokens == 5
        done["plain"] += 1
    for kind, changes in (
        (litellm.BadRequestError, {"temperature": 3}),
        (litellm.NotFoundError, {"model": "openai/gpt-4"}),
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "a b" * 9000}]}),
    ):
        try:
            litellm.completion(**asked | changes)
        except kind:
            done["errors"] += 1

    async def many() -> list[str]:
        answers = await asyncio.gather(
            *(litellm.acompletion(**asked, seed=number % 8, max_tokens=16) for number in range(32))
        )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(many())
    assert texts == texts[:8] * 4
    done["at once"] += 32
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])

"""OpenAI's own client with `benthic serve`: python examples/openai_client.py [http://127.0.0.1:8000/v1]

Needs the openai package. A server with API keys reads the one in OPENAI_API_KEY.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["add", "subtract"]}, "exact": {"type": "boolean"}},
    "required": ["name", "exact"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find a function by its name.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


def main(url: str) -> None:
    """A chat, a stream, an answer bound to a schema, and a call of a tool."""
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]

    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32)
    print("chat:", answer.choices[0].message.content)

    print("stream: ", end="")
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=32, stream=True, stream_options=options
    ):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f"\n{chunk.usage.completion_tokens} tokens")

    form = {"type": "json_schema", "json_schema": {"name": "function", "schema": SCHEMA}}
    bound = client.chat.completions.create(model=model, messages=messages, max_tokens=128, response_format=form)
    print("schema:", bound.choices[0].message.content)

    # Tools need a chat template that shows them; others are refused with 400 and the reason.
    called = client.chat.completions.create(
        model=model, messages=messages, max_tokens=256, tools=[TOOL], tool_choice="required"
    )
    for call in called.choices[0].message.tool_calls or []:
        print("tool:", call.function.name, call.function.arguments)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")

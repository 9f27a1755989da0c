"""Messages of a client become a prompt's tokens, by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from benthic.errors import RequestError, TextError
from benthic.serve.refusal import wrong
from benthic.serve.requests import Message, Tool
from benthic.text import Tokenizer


async def prompt_of(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    param: str = "messages",
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Token ids; `param` is where the messages came from. Runs in a thread, as templates and long texts take time.

    Raises Refusal 400.
    """
    plain = [_plain(message, place) for place, message in enumerate(messages)]
    _refuse_unread(tokenizer, plain, param)
    if tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        return await asyncio.to_thread(
            tokenizer.encode_chat, plain, add_generation_prompt=add_generation_prompt, **variables
        )
    except (RequestError, TextError) as error:
        raise wrong(f"the messages cannot be put into the model's form: {error}", param) from None


def refuse_many(messages: Sequence[Message], most: int, param: str = "messages") -> None:
    """Raise Refusal 400 for more messages than are allowed."""
    if len(messages) > most:
        raise wrong(f"{len(messages)} messages; at most {most} are allowed", param)


async def tokens_of(tokenizer: Tokenizer, text: str, add_bos: bool) -> list[int]:
    """Token ids of a plain text."""
    try:
        return await asyncio.to_thread(tokenizer.encode, text, add_bos)
    except TextError as error:
        raise wrong(str(error), "prompt") from None


def _plain(message: Message, place: int) -> dict[str, Any]:
    """As templates read it."""
    result = message.model_dump(exclude_none=True)
    if message.role == "developer":
        result["role"] = "system"
    if isinstance(message.content, list):
        result["content"] = "\n".join(part.text for part in message.content)
    if message.content is None:
        if message.role != "assistant" or not message.tool_calls:
            raise wrong("content is missing", f"messages.{place}.content", "invalid_value")
        result["content"] = None
    if message.tool_calls is not None and message.role != "assistant":
        raise wrong("only assistants call tools", f"messages.{place}.tool_calls", "invalid_value")
    reasoning = result.pop("reasoning", None)
    if reasoning is not None:
        result.setdefault("reasoning_content", reasoning)
    return result


def _refuse_unread(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], param: str) -> None:
    """A template that does not read calls would leave them out without a word."""
    source = tokenizer.templates.get("default", "")
    if "tool_calls" not in source and any("tool_calls" in message for message in messages):
        raise wrong("the chat template of this model knows no tool calls", param, "unsupported_parameter")

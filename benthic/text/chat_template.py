"""ChatTemplate: a conversation becomes the text a model was trained on, by the model's own jinja template.

A template comes with a downloaded model, so it is somebody else's program: it runs in `sandbox.py` and sees plain JSON
values only. Messages are somebody else's text: `render(control=...)` puts MARK around each spelling of a control token
in them, so that `Tokenizer.encode_chat` knows what the template wrote from what a user typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benthic.errors import RequestError, TextError
from benthic.text.sandbox import compile_template, names_read, run_template

MARK = "\ufdd0"
"""A Unicode noncharacter: no text may contain it, so it is dropped from messages and free for our use."""


class ChatTemplate:
    """One compiled template; `variables` are the names that it reads."""

    def __init__(self, source: str, origin: str = "chat template") -> None:
        self.source = source
        self.origin = origin
        self._template = compile_template(source, origin)
        self.variables = names_read(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str] | None = None,
        control: re.Pattern[str] | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`.

        `tokens` are the spellings a template may name (bos_token, eos_token ...), `variables` what a caller adds
        (tools, add_generation_prompt, thinking ...), `control` the spellings to mark where a caller wrote them.
        RequestError: the messages are not what the template takes. TextError: the template itself fails.
        """
        if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages):
            raise RequestError("messages must be a list of objects such as {'role': 'user', 'content': 'Hi'}")
        defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
        given = {**variables, "messages": [_without_nulls(message) for message in messages]}
        given = {name: _plain(value, name, control) for name, value in given.items()}
        context = defaults | dict(tokens or {}) | given
        return run_template(self._template, context, self.origin)


def load_templates(file: str | None, config: Mapping[str, Any], origin: str) -> dict[str, str]:
    """Templates by name from chat_template.jinja (it wins) and tokenizer_config.json's string or list of named ones."""
    listed = config.get("chat_template") or []
    if isinstance(listed, str):
        listed = [{"name": "default", "template": listed}]
    try:
        found = {str(one["name"]): str(one["template"]) for one in listed}
    except (TypeError, KeyError):
        raise TextError(
            f"chat_template in {origin} must be a string or a list of objects with name and template"
        ) from None
    return found if file is None else found | {"default": file}


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Clients send null for what is absent, and templates ask whether it is there; of content V3's ask `is none`."""
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _plain(value: Any, where: str, control: re.Pattern[str] | None) -> Any:
    """A copy made of JSON types alone, with MARK around each control token's spelling."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            text = str(value).replace(MARK, "")
            return control.sub(lambda found: f"{MARK}{found[0]}{MARK}", text) if control else text
        case Mapping():
            return {str(key): _plain(one, f"{where}.{key}", control) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one, f"{where}[{index}]", control) for index, one in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}; allowed: text, numbers, true, false, null, lists, objects"
    )

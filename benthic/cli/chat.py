"""`benthic chat FOLDER`, or `--url` of a server: a conversation on the terminal, in the model's own chat format.

Answers go to stdout, and what a model thinks before them to stderr: it is no part of the talk that follows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Protocol

from benthic.cli.api_key import add_key_options, read_key
from benthic.cli.engine_options import (
    SAMPLING,
    Parser,
    add_engine_options,
    add_sampling_options,
    open_engine,
    sampling_params,
)
from benthic.cli.terminal import shown
from benthic.errors import ConfigError, RequestError
from benthic.serve.parts import Content, Part, Reasoning

DEFAULT_MAX_TOKENS = 1024
HELP = "/new begins another conversation, /exit leaves; Ctrl-C ends an answer"
Messages = list[dict[str, str]]


class Partner(Protocol):
    """Who answers."""

    def answer(self, messages: Messages) -> Generator[Part, None, None]:
        """The answer's parts as they come; closing the generator ends it. Raises RequestError."""
        ...


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of sampling are named as in SamplingParams."""
    parser = Parser(prog="benthic chat", description=__doc__, epilog=HELP, allow_abbrev=False)
    add_engine_options(parser, folder_is_needed=False)
    remote = parser.add_argument_group("instead of a FOLDER")
    remote.add_argument("--url", help="an OpenAI-compatible server, such as http://127.0.0.1:8000")
    remote.add_argument("--model", help="the server's name of the model (default: the only one it has)")
    add_key_options(remote)
    parser.add_argument("--system", help="what the model is told before the first message")
    add_sampling_options(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Load or connect, then a message and an answer in turn until the input ends."""
    options = make_parser().parse_args(arguments)
    _refuse_contradictions(options)
    partner: Partner = _Local(options) if options.url is None else _Remote(options)
    beginning = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(beginning)
    print(HELP, file=sys.stderr)
    for text in _lines():
        if text == "/exit":
            break
        if text == "/new":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _say(partner, messages)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
    return 0


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if (options.url is None) == (options.folder is None):
        raise ConfigError("chat needs a FOLDER or --url, one of them", hint="benthic chat --help tells more")
    # The parser's own defaults are what was not given.
    local = {"--device": options.device != "cpu", "--speculative": options.speculative}
    remote = {
        f"--{name.replace('_', '-')}": getattr(options, name) for name in ("model", "api_key_env", "api_key_file")
    }
    for name, given in (local if options.folder is None else remote).items():
        if given:
            raise ConfigError(f"{name} does not go with {'--url' if options.folder is None else 'a FOLDER'}")


def _lines() -> Iterator[str]:
    """What the user types, until the input ends."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _say(partner: Partner, messages: Messages) -> str:
    """The answer, printed as it comes; an interrupt ends it and keeps what was said."""
    said: list[str] = []
    thinks = False
    dim, plain = ("\x1b[2m", "\x1b[0m\n") if sys.stderr.isatty() else ("", "\n")
    try:
        with closing(partner.answer(messages)) as parts:
            for part in parts:
                is_thought = isinstance(part, Reasoning)
                if is_thought != thinks:
                    print(dim if is_thought else plain, end="", file=sys.stderr, flush=True)
                    thinks = is_thought
                if is_thought:
                    print(shown(part.text, sys.stderr), end="", file=sys.stderr, flush=True)
                elif isinstance(part, Content):
                    print(shown(part.text, sys.stdout), end="", flush=True)
                    said.append(part.text)
    except KeyboardInterrupt:
        pass
    except RequestError:
        if said:
            print(flush=True)
        raise
    finally:
        if thinks:
            print(plain, end="", file=sys.stderr, flush=True)
    print(flush=True)
    return "".join(said)


class _Local:
    """A model of this machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._params = sampling_params(options)
        self._engine, self._tokenizer = open_engine(options)
        self._uses_room = options.max_tokens is None
        self._tokenizer.chat_template()  # without one there is nothing to say, and the error tells it at once

    def answer(self, messages: Messages) -> Generator[Part, None, None]:
        from benthic.serve.answer_parts import AnswerParts

        prompt = self._tokenizer.encode_chat(messages, add_generation_prompt=True)
        params, engine = self._params, self._engine
        if self._uses_room:
            room = engine.model.config.max_position_embeddings - len(prompt)
            params = params.replace(max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
        parts = AnswerParts(self._tokenizer, prompt)
        (request_id,) = engine.add_request(prompt, params)
        try:
            while engine.has_work:
                for event in engine.step():
                    yield from parts.add(event.text)
            yield from parts.finish()
        finally:
            engine.cancel(request_id)  # nothing happens where it ended


class _Remote:
    """A model of a server. Parameters that OpenAI does not know have vLLM's names, and are sent only where given."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benthic.cli.remote import Remote

        self._parameters = _parameters(options)
        self._remote = Remote(options.url, read_key(options), options.model)

    def answer(self, messages: Messages) -> Generator[Part, None, None]:
        yield from self._remote.chat(messages, self._parameters)


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in (*SAMPLING, "stop") if getattr(options, name) is not None}
    forms = {name: given.pop(name) for name in ("json_schema", "regex", "grammar") if name in given}
    if len(forms) > 1:
        raise ConfigError(f"{' and '.join(forms)} both bind the answer; give one")
    if "json_schema" in forms:
        try:
            schema = json.loads(forms["json_schema"])
        except ValueError as error:
            raise ConfigError(f"--json-schema is not JSON: {error}") from None
        given["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    elif forms:
        given["structured_outputs"] = forms
    return given

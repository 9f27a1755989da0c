"""`benthic chat FOLDER`: a conversation on the terminal, in the model's own chat format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benthic.cli.engine_options import Parser, add_engine_options, add_sampling_options, open_engine, sampling_params
from benthic.errors import RequestError

if TYPE_CHECKING:
    from benthic.inference.engine import Engine
    from benthic.model.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 1024
HELP = "/new begins another conversation, /exit leaves; Ctrl-C ends an answer"


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of sampling are named as in SamplingParams."""
    parser = Parser(prog="benthic chat", description=__doc__, epilog=HELP, allow_abbrev=False)
    add_engine_options(parser)
    parser.add_argument("--system", help="what the model is told before the first message")
    add_sampling_options(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Load, then a message and an answer in turn until the input ends."""
    options = make_parser().parse_args(arguments)
    params = sampling_params(options)
    engine, tokenizer = open_engine(options)
    tokenizer.chat_template()  # without one there is nothing to say, and the error tells it at once
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
            prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
            answer = _say(engine, prompt, params, options.max_tokens is None)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
    return 0


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


def _say(engine: Engine, prompt: list[int], params: SamplingParams, use_room: bool) -> str:
    """The answer, printed as it comes; an interrupt ends it and keeps what was said."""
    if use_room:
        room = engine.model.config.max_position_embeddings - len(prompt)
        params = params.replace(max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
    (request_id,) = engine.add_request(prompt, params)
    said: list[str] = []
    try:
        while engine.has_work:
            for event in engine.step():
                print(event.text, end="", flush=True)
                said.append(event.text)
    except KeyboardInterrupt:
        engine.cancel(request_id)
    print()
    return "".join(said)

"""`benthic generate FOLDER`: text from a model folder, streamed to the terminal, or a file of prompts to a file of
answers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benthic.cli.engine_options import (
    Parser,
    add_engine_options,
    add_sampling_options,
    check_device,
    open_engine,
    sampling_params,
)
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.model import LanguageModel
    from benthic.model.sampling import SamplingParams
    from benthic.text import Tokenizer

DEFAULT_MAX_TOKENS = 128


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of sampling are named as in SamplingParams."""
    parser = Parser(prog="benthic generate", description=__doc__, allow_abbrev=False)
    add_engine_options(parser)
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--input", type=Path, help="prompts, one JSON object a line: prompt, token_ids or messages")
    parser.add_argument(
        "--output", type=Path, help="where their answers go; an interrupted command goes on where it was"
    )
    add_sampling_options(parser)
    parser.add_argument("--plain", action="store_true", help="the reference: one prompt, no engine")
    parser.add_argument("--json", action="store_true", help="one JSON object with the text and settings, at the end")
    return parser


def main(arguments: list[str]) -> int:
    """Load, continue the prompt, print."""
    options = make_parser().parse_args(arguments)
    if (options.input is None) != (options.output is None):
        raise ConfigError("--input and --output belong together", hint="give both, or --prompt")
    params = sampling_params(options)
    if options.input is not None:
        return _answer_file(options, params)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if options.plain and (options.weights or options.cache):
        raise ConfigError("--weights and --cache are the engine's; --plain is the reference, without one")
    continue_ = _plainly if options.plain else _by_engine
    text, params = continue_(options, prompt, params)
    if options.json:
        print(json.dumps({"prompt": prompt, "text": text, **params.model_dump()}, ensure_ascii=False))
    else:
        print()
    return 0


def _by_engine(options: argparse.Namespace, prompt: str, params: SamplingParams) -> tuple[str, SamplingParams]:
    engine, tokenizer = open_engine(options)
    if options.max_tokens is None:
        params = _fitting(params, prompt, tokenizer, engine.model)
    on_event = None if options.json else lambda event: print(event.text, end="", flush=True)
    (done,) = engine.generate([prompt], params, on_event)
    return done.text, params


def _plainly(options: argparse.Namespace, prompt: str, params: SamplingParams) -> tuple[str, SamplingParams]:
    from benthic.inference.generate import generate_text
    from benthic.inference.pretrained import load_model
    from benthic.text import Tokenizer

    tokenizer = Tokenizer.from_folder(options.folder)
    model = load_model(options.folder, device=check_device(options.device))
    if options.max_tokens is None:
        params = _fitting(params, prompt, tokenizer, model)
    pieces = []
    for piece in generate_text(model, tokenizer, prompt, params):
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    return "".join(pieces), params


def _fitting(params: SamplingParams, prompt: str, tokenizer: Tokenizer, model: LanguageModel) -> SamplingParams:
    room = model.config.max_position_embeddings - len(tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token))
    return params.replace(max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))


def _answer_file(options: argparse.Namespace, params: SamplingParams) -> int:
    from benthic.inference.offline import answer_file

    if options.prompt is not None or options.plain:
        raise ConfigError("--input answers a file of prompts by the engine; --prompt and --plain do not go with it")
    answered = answer_file(open_engine(options)[0], options.input, options.output, params)
    print(json.dumps(answered) if options.json else options.output)
    return 0

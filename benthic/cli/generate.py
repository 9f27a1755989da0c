"""`benthic generate FOLDER`: text from a model folder, streamed to the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from benthic.errors import ConfigError

DEFAULT_MAX_TOKENS = 128


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="benthic generate --help lists what is allowed")


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of sampling are named as in SamplingParams."""
    parser = _Parser(prog="benthic generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json, weights and tokenizer.json")
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--max-tokens", type=int, help=f"most tokens (default {DEFAULT_MAX_TOKENS}, or what fits)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default 1)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, help="draw among the fewest tokens of this probability (default 1)")
    parser.add_argument("--seed", type=int, help="repeat the same draws")
    parser.add_argument("--stop", action="append", help="end before this text; may be given again")
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object with the text and settings, at the end")
    return parser


def main(arguments: list[str]) -> int:
    """Load, continue the prompt, print."""
    options = make_parser().parse_args(arguments)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt

    from benthic.inference.generate import generate_text
    from benthic.inference.pretrained import load_model
    from benthic.model.sampling import SamplingParams
    from benthic.text import Tokenizer

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    params = SamplingParams(**given)
    tokenizer = Tokenizer.from_folder(options.folder)
    model = load_model(options.folder, device=_device(options.device))
    if options.max_tokens is None:
        room = model.config.max_position_embeddings - len(tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token))
        params = params.replace(max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
    pieces = []
    for piece in generate_text(model, tokenizer, prompt, params):
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    if options.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), **params.model_dump()}, ensure_ascii=False))
    else:
        print()
    return 0


def _device(name: str):
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="benthic doctor shows what is there"
        ) from None

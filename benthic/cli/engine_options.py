"""The options that generate and chat share: which engine, and how it draws."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.inference.engine import Engine
    from benthic.model.sampling import SamplingParams
    from benthic.text import Tokenizer


class Parser(argparse.ArgumentParser):
    """A wrong argument is a ConfigError, as every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"{self.prog} --help lists what is allowed")


def add_engine_options(parser: argparse.ArgumentParser, folder_is_needed: bool = True) -> None:
    """The folder, the device and speculation."""
    nargs = None if folder_is_needed else "?"
    parser.add_argument(
        "folder", type=Path, nargs=nargs, metavar="FOLDER", help="config.json, weights and tokenizer.json"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--speculative", action="store_true", help="draft tokens with the model's prediction layers")


SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens of an answer"),
    "temperature": (float, "0 takes the likeliest token (default 1)"),
    "top_k": (int, "draw among the k likeliest tokens (default 0: all)"),
    "top_p": (float, "draw among the fewest tokens of this probability (default 1)"),
    "min_p": (float, "draw among tokens of this share of the likeliest one's probability (default 0)"),
    "repetition_penalty": (float, "divide the logits of tokens seen before (default 1)"),
    "presence_penalty": (float, "take this from the logits of tokens of the answer (default 0)"),
    "frequency_penalty": (float, "take this as often as they appear (default 0)"),
    "min_tokens": (int, "do not end before (default 0)"),
    "seed": (int, "repeat the same draws"),
    "json_schema": (str, "bind the answer to this JSON schema"),
    "regex": (str, "bind the answer to this regular expression"),
    "grammar": (str, "bind the answer to this Lark grammar"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options named as the fields of SamplingParams."""
    for name, (kind, text) in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--stop", action="append", help="end before this text; may be given again")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """What the options ask for; the rest as SamplingParams has it."""
    from benthic.model.sampling import SamplingParams

    given = {name: getattr(options, name) for name in (*SAMPLING, "stop")}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def open_engine(options: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    """The engine that the options name, and its tokenizer."""
    from benthic.inference.engine import Engine
    from benthic.text import Tokenizer

    tokenizer = Tokenizer.from_folder(options.folder)
    engine = Engine(options.folder, check_device(options.device), options.speculative, tokenizer=tokenizer)
    return engine, tokenizer


def check_device(name: str) -> str:
    """`name`, if torch can use it here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="benthic doctor shows what is there"
        ) from None
    return name

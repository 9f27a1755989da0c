"""The key that a client sends: from a variable of the environment or from a file, never from the command line, which
other users of the machine can read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benthic.config.settings import read_text
from benthic.errors import ConfigError


def add_key_options(parser: argparse._ActionsContainer) -> None:
    """--api-key-env and --api-key-file."""
    parser.add_argument("--api-key-env", metavar="NAME", help="the variable of the environment that has the API key")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="its first line is the key; # begins a comment"
    )


def read_key(options: argparse.Namespace) -> str | None:
    """The key that the options name. Raises ConfigError where there is none, or two are named."""
    name, path = options.api_key_env, options.api_key_file
    if name is not None and path is not None:
        raise ConfigError("--api-key-env and --api-key-file both name a key; give one")
    if name is not None:
        where, lines = f"the environment's {name}", os.environ.get(name, "").splitlines()
    elif path is not None:
        where, lines = str(path), read_text(path, "API key").splitlines()
    else:
        return None
    key = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
    if not key:
        raise ConfigError(f"there is no API key in {where}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the API key in {where} has characters that no header can carry")
    return key

"""The command line's front door: names a command, imports that one alone, and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

from benthic.errors import BenthicError, ConfigError, did_you_mean
from benthic.log import to_stderr

COMMANDS = {
    "demo": "train, sample and export a small V3 on this machine, without network",
    "plan": "parameters, FLOPs, KV cache, memory, layout, time, cost",
    "train": "pretraining and context extension from a recipe; --resume",
    "generate": "text from a model folder, on the terminal or from file to file",
    "serve": "an OpenAI-compatible server on 127.0.0.1:8000",
    "chat": "a conversation on the terminal, with a model folder or a server (--url)",
    "convert": "checkpoints: fp8 <-> bf16, sharded <-> one file",
    "inspect": "a checkpoint's names, shapes, sizes, hashes and faults",
    "bench": "training and kernels beside their peers, in the same run",
    "doctor": "versions, device, what is missing and the command that mends it",
}


def usage() -> str:
    """The text of `benthic --help`."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: benthic COMMAND [ARGUMENTS]",
            "",
            "Plan, train, serve and look inside DeepSeek-V3-style language models.",
            "",
            *lines,
            "",
            "benthic COMMAND --help tells more; benthic --version prints the version.",
        ]
    )


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code. A user's error is a message on stderr and code 2, never a traceback."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        import benthic

        print(benthic.__version__)
        return 0
    to_stderr()
    try:
        return _command(arguments[0])(arguments[1:])
    except BenthicError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left (`| head`): say nothing more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a name too long, a file that vanished: what no command foresaw of the system's refusals
        print(f"error: the system refused: {error.strerror or error}: {str(error.filename)[:200]!r}", file=sys.stderr)
        return BenthicError.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _command(name: str):
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}", hint=did_you_mean(name, COMMANDS))
    return import_module(f"benthic.cli.{name}").main


def run() -> None:
    """Entry point of the `benthic` script."""
    sys.exit(main(sys.argv[1:]))

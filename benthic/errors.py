"""Every error benthic raises on purpose.

    BenthicError
    ├── ConfigError        (ValueError)   a setting, a preset, a config.json
    ├── CheckpointError    (ValueError)   weights on disk: missing, extra, misshapen, corrupt
    ├── DataError          (ValueError)   corpora, token files, manifests
    ├── TextError          (ValueError)   tokenizers and chat templates
    ├── RunError           (RuntimeError) a run folder: resume, locks, permissions
    ├── NumericsError      (ArithmeticError)  a non-finite value where none may be
    ├── CapacityError      (RuntimeError) memory or disk that is not there
    └── RequestError       (ValueError)   one request of a client or caller

A message says what is wrong, the value, what was allowed, where it came from; `hint` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BenthicError(Exception):
    """Root of the tree. `exit_code` is what the command line leaves with."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(BenthicError, ValueError):
    """A setting, a preset or a config.json is wrong."""


class CheckpointError(BenthicError, ValueError):
    """Weights on disk are missing, extra, misshapen or corrupt."""


class DataError(BenthicError, ValueError):
    """A corpus, a token file or its manifest is wrong."""


class TextError(BenthicError, ValueError):
    """A tokenizer or chat template is missing or wrong."""


class RunError(BenthicError, RuntimeError):
    """A run folder cannot be used as asked."""


class PeerError(BenthicError, RuntimeError):
    """This rank stops because another did, and that one says why."""


class NumericsError(BenthicError, ArithmeticError):
    """A non-finite value appeared where none may be; the run stopped before using it."""

    exit_code = 3


class CapacityError(BenthicError, RuntimeError):
    """Memory or disk that the work needs is not there."""


class RequestError(BenthicError, ValueError):
    """One request cannot be served as asked."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name closest to `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest allowed one, else the whole list."""
    allowed = sorted(allowed)
    near = nearest(name, allowed)
    return f"did you mean {near!r}?" if near else "allowed: " + ", ".join(allowed)

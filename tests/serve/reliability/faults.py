"""Faults that a test asks a running server for, by files in a folder that an environment variable names.

A file's name is the place, its content how often and with what argument. Only the patched programs of these tests look.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "BENTHIC_TEST_FAULTS"


class Faults:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def ask(self, place: str, times: int = 1, argument: float = 0.0) -> None:
        """Let `place` fail the next `times` times."""
        new = self.folder / f".{place}"
        new.write_text(json.dumps([times, argument]))
        new.rename(self.folder / place)

    def stop(self, place: str) -> None:
        """No more."""
        (self.folder / place).unlink(missing_ok=True)

    def is_waiting(self, place: str) -> bool:
        """Whether what was asked for has not all happened yet."""
        return (self.folder / place).exists()


def due(place: str) -> float | None:
    """The argument, where `place` is to fail now; counts down."""
    file = Path(os.environ[FOLDER]) / place
    try:
        times, argument = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    if times > 1:
        file.write_text(json.dumps([times - 1, argument]))
    else:
        file.unlink()
    return argument


def raises(place: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which raises RuntimeError where `place` is due."""

    @functools.wraps(call)
    def faulty(*arguments: Any, **named: Any) -> Any:
        if due(place) is not None:
            raise RuntimeError(f"injected into the {place}")
        return call(*arguments, **named)

    return faulty


def pause(place: str) -> None:
    """Sleep for the argument's seconds where `place` is due."""
    if (seconds := due(place)) is not None:
        time.sleep(seconds)

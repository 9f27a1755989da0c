"""What a person sees of a run, on stderr: a live bar on a terminal, plain lines elsewhere, nothing for a library user
who has not asked for log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benthic.log import logger
from benthic.train.step import Update


class Lines:
    """One log line a row."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first, self._began = steps, first, time.monotonic()

    def updated(self, update: Update, tokens_per_second: float) -> None:
        """Called after each update; lines wait for the row."""

    def row(self, row: dict[str, Any]) -> None:
        """A logged update."""
        seconds_an_update = (time.monotonic() - self._began) / (row["step"] - self._first)
        left = (self._steps - row["step"]) * seconds_an_update
        logger.info("step %d/%d  %s  left %s", row["step"], self._steps, describe(row), clock(left))

    def note(self, text: str) -> None:
        """Anything else worth a line."""
        logger.info("%s", text)


class Bar(Lines):
    """A bar with loss, speed and the time that is left, under the notes. Colours follow NO_COLOR."""

    def __init__(self, steps: int, progress: Progress, first: int) -> None:
        super().__init__(steps, first)
        self._progress = progress
        self._task = progress.add_task("train", total=steps, completed=first, loss="", speed="")

    def updated(self, update: Update, tokens_per_second: float) -> None:
        """Move the bar."""
        loss = f"loss {update.loss:.3f}"
        self._progress.update(self._task, completed=update.step, loss=loss, speed=f"{tokens_per_second:,.0f} tokens/s")

    def row(self, row: dict[str, Any]) -> None:
        """Rows are in the bar already."""

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)


@contextmanager
def shown(steps: int, first: int) -> Iterator[Lines]:
    """The display that fits where stderr goes."""
    console = Console(stderr=True)
    if not (console.is_terminal and logger.isEnabledFor(logging.INFO)):
        yield Lines(steps, first)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(steps, progress, first)


def describe(row: dict[str, Any]) -> str:
    """The numbers of a row in words."""
    shown = [f"loss {row['loss']:.3f}"]
    if row["mtp_loss"] is not None:
        shown.append(f"mtp {row['mtp_loss']:.3f}")
    shown.append(f"lr {row['lr']:.2e}")
    if row["max_violation"] is not None:
        shown.append(f"MaxVio {row['max_violation']:.2f}")
    shown.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(shown)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

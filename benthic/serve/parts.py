"""What an answer is made of."""

from __future__ import annotations

from typing import NamedTuple


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text before the answer proper."""

    text: str


class Call(NamedTuple):
    """A tool call begins."""

    index: int
    id: str
    function: str


class Arguments(NamedTuple):
    """A piece of the JSON of call `index`."""

    index: int
    text: str


Part = Content | Reasoning | Call | Arguments


def begun_of(mark: str, text: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)

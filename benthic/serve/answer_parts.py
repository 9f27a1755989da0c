"""AnswerParts: an answer's text, as it comes, told apart into reasoning and content."""

from __future__ import annotations

from typing import NamedTuple

from benthic.text import Tokenizer

THINK, END_OF_THOUGHT = "<think>", "</think>"
TAIL_TOKENS = 8
"""How far back the end of a prompt is read for an open thought."""


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text before the answer proper."""

    text: str


Part = Content | Reasoning


class AnswerParts:
    """A state machine over text in any pieces: the parts, joined by their kind, are those of the whole text."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        tail = tokenizer.decode(prompt[-TAIL_TOKENS:]).rstrip()
        self.is_reasoning = tail.endswith(THINK)
        self._may_begin_thought = not self.is_reasoning and not tail.endswith(END_OF_THOUGHT)
        self._held = ""
        self._strips = self.is_reasoning

    def add(self, text: str) -> list[Part]:
        """The parts that `text` completes; what could be the beginning of a mark is held back."""
        self._held += text
        found: list[Part] = []
        if self._may_begin_thought:
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self.is_reasoning, self._held, self._strips = True, begun[len(THINK) :], True
            elif THINK.startswith(begun):
                return found
            self._may_begin_thought = False
        if self.is_reasoning:
            thought, mark, rest = self._held.partition(END_OF_THOUGHT)
            if mark:
                self._say(found, Reasoning, thought.rstrip())
                self.is_reasoning, self._held, self._strips = False, rest, True
            else:
                # White space may turn out to stand before the mark, and the mark may have begun.
                keep = len(thought[: len(thought) - begun_of(END_OF_THOUGHT, thought)].rstrip())
                self._say(found, Reasoning, thought[:keep])
                self._held = thought[keep:]
                return found
        self._say(found, Content, self._held)
        self._held = ""
        return found

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        found: list[Part] = []
        self._say(found, Reasoning if self.is_reasoning else Content, self._held)
        self._held = ""
        return found

    def _say(self, found: list[Part], kind: type[Content] | type[Reasoning], text: str) -> None:
        if self._strips:
            text = text.lstrip()
        if text:
            self._strips = False
            found.append(kind(text))


def begun_of(mark: str, text: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)

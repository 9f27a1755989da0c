"""AnswerParts: an answer's text, as it comes, told apart into reasoning, content and tool calls."""

from __future__ import annotations

from benthic.serve.parts import Content, Part, Reasoning, begun_of
from benthic.serve.tool_text import ToolText
from benthic.text import Tokenizer
from benthic.text.tool_format import ToolFormat

THINK, END_OF_THOUGHT = "<think>", "</think>"
TAIL_TOKENS = 8
"""How far back the end of a prompt is read for an open thought."""


def thought_is_open(tokenizer: Tokenizer, prompt: list[int]) -> bool:
    """Whether a prompt ends where its answer begins by thinking."""
    return _tail(tokenizer, prompt).endswith(THINK)


def _tail(tokenizer: Tokenizer, prompt: list[int]) -> str:
    return tokenizer.decode(prompt[-TAIL_TOKENS:]).rstrip()


class AnswerParts:
    """A state machine over text in any pieces: the parts, joined by their kind, are those of the whole text.

    `tools` is the format of calls, where the client gave tools. White space around a thought is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], tools: ToolFormat | None = None) -> None:
        tail = _tail(tokenizer, prompt)
        self.is_reasoning = tail.endswith(THINK)
        self._may_begin_thought = not self.is_reasoning and not tail.endswith(END_OF_THOUGHT)
        self._tools = None if tools is None else ToolText(tools)
        self._held = ""
        self._strips = self.is_reasoning

    @property
    def calls(self) -> int:
        """How many tool calls began."""
        return 0 if self._tools is None else self._tools.calls

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
        if self.is_reasoning and not self._think(found):
            return found
        self._say(found, self._held)
        self._held = ""
        return found

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        found: list[Part] = []
        if self.is_reasoning:
            self._say_thought(found, self._held)
        else:
            self._say(found, self._held)
            found += self._tools.finish() if self._tools is not None else []
        self._held = ""
        return found

    def _think(self, found: list[Part]) -> bool:
        """Take what is certainly thought; whether the thought ended."""
        thought, mark, rest = self._held.partition(END_OF_THOUGHT)
        if mark:
            self._say_thought(found, thought.rstrip())
            self.is_reasoning, self._held, self._strips = False, rest, True
            return True
        # White space may turn out to stand before the mark, and the mark may have begun.
        keep = len(thought[: len(thought) - begun_of(END_OF_THOUGHT, thought)].rstrip())
        self._say_thought(found, thought[:keep])
        self._held = thought[keep:]
        return False

    def _say_thought(self, found: list[Part], text: str) -> None:
        if text := self._stripped(text):
            found.append(Reasoning(text))

    def _say(self, found: list[Part], text: str) -> None:
        if text := self._stripped(text):
            found += [Content(text)] if self._tools is None else self._tools.add(text)

    def _stripped(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text

"""ToolText: the text of an answer, as it comes, told apart into content and tool calls.

A state machine over text in any pieces. Markup that is no call is content: nothing that a model wrote is lost.
"""

from __future__ import annotations

import uuid
from enum import Enum, auto

from benthic.serve.parts import Arguments, Call, Content, Part, begun_of
from benthic.text.tool_format import ToolFormat

LONGEST_HEADER = 512


class _Place(Enum):
    TEXT = auto()
    SECTION = auto()
    HEADER = auto()
    ARGUMENTS = auto()


class ToolText:
    """One answer's."""

    def __init__(self, format_: ToolFormat) -> None:
        self._format = format_
        self._place = _Place.TEXT
        self._held = ""
        self._said_arguments = False
        self.calls = 0

    def add(self, text: str) -> list[Part]:
        """The parts that `text` completes; what could be the beginning of a mark is held back."""
        self._held += text
        found: list[Part] = []
        while self._advance(found):
            pass
        return found

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        found: list[Part] = []
        match self._place:
            case _Place.HEADER:
                _say(found, self._format.call_begin + held)
            case _Place.ARGUMENTS:
                self._end_arguments(found)  # what is held is the beginning of the end
            case _Place.SECTION:
                _say(found, held.rstrip())
            case _Place.TEXT:
                _say(found, held)
        self._place = _Place.TEXT
        return found

    def _advance(self, found: list[Part]) -> bool:
        """Take what the held text allows; whether the place changed."""
        format_ = self._format
        match self._place:
            case _Place.TEXT:
                before, mark = self._split((format_.begin, format_.call_begin))
                _say(found, before)
                self._place = {format_.begin: _Place.SECTION, format_.call_begin: _Place.HEADER}.get(mark, _Place.TEXT)
            case _Place.SECTION:
                before, mark = self._split((format_.call_begin, format_.end))
                # White space around calls is dropped, but not between the words of what is no call.
                said = before.rstrip()
                _say(found, said)
                self._held = ("" if mark else before[len(said) :]) + self._held
                self._place = {format_.call_begin: _Place.HEADER, format_.end: _Place.TEXT}.get(mark, _Place.SECTION)
            case _Place.HEADER:
                return self._read_header(found)
            case _Place.ARGUMENTS:
                before, mark = self._split(format_.closings)
                self._say_arguments(found, before)
                if mark:
                    self._end_arguments(found)
                    self._place = _Place.SECTION
        return bool(mark)

    def _read_header(self, found: list[Part]) -> bool:
        header, mark, rest = self._held.partition(self._format.opening)
        # The mark may have begun: a header is as long as it is, in whichever pieces it comes.
        length = len(header) - (0 if mark else begun_of(self._format.opening, header))
        could_be_one = length <= LONGEST_HEADER and self._format.call_end not in header
        if could_be_one and not mark:
            return False
        function = self._format.function_of(header) if could_be_one else None
        if function is None:
            # Not a call: its mark is text, and so is what follows.
            _say(found, self._format.call_begin)
            self._place = _Place.TEXT
            return True
        self._held, self._place, self._said_arguments = rest, _Place.ARGUMENTS, False
        given = header.strip()
        # Kimi's models read their own numbering back.
        found.append(Call(self.calls, given if self._format.numbers else f"call_{uuid.uuid4().hex[:24]}", function))
        self.calls += 1
        return True

    def _say_arguments(self, found: list[Part], text: str) -> None:
        if not self._said_arguments:
            text = text.lstrip()
        if text:
            self._said_arguments = True
            found.append(Arguments(self.calls - 1, text))

    def _end_arguments(self, found: list[Part]) -> None:
        if not self._said_arguments:
            self._say_arguments(found, "{}")

    def _split(self, marks: tuple[str, ...]) -> tuple[str, str]:
        """The held text before the first of `marks`, and that mark; without one, what cannot be its beginning."""
        places = [(place, -len(mark), mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if places:
            place, _, mark = min(places)
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            return before, mark
        keep = len(self._held) - max(begun_of(mark, self._held) for mark in marks)
        before, self._held = self._held[:keep], self._held[keep:]
        return before, ""


def _say(found: list[Part], text: str) -> None:
    if text:
        found.append(Content(text))

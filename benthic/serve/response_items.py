"""OutputItems: the parts of an answer, as they come, become the items of a response and the events that tell of them.

A response that is not streamed is built by the same steps, its events unsent: so both are the same.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Literal

from msgspec.structs import replace

from benthic.serve.parts import Arguments, Call, Content, Part, Reasoning
from benthic.serve.response_wire import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    Event,
    Item,
    ItemEvent,
    MessageItem,
    OutputText,
    PartEvent,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    TextDelta,
    TextDone,
)
from benthic.serve.wire import TokenLogprob

EndStatus = Literal["completed", "incomplete"]


class OutputItems:
    """`items` are those that began; the last one may be open. White space before a call is left out."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._texts: list[str] = []
        self._is_open = False
        self._blank = ""
        self._logprobs: list[TokenLogprob] = []
        self._unsaid: list[TokenLogprob] = []

    def add(self, parts: list[Part], logprobs: list[TokenLogprob]) -> Iterator[Event]:
        """What `parts` change; `logprobs` are those of their content's tokens."""
        if not isinstance(self._open, CallItem):
            self._unsaid += logprobs
        for part in parts:
            match part:
                case Content(text):
                    yield from self._say(text)
                case Reasoning(text):
                    if not isinstance(self._open, ReasoningItem):
                        yield from self._begin(ReasoningItem(_new_id("rs")))
                    yield self._delta(text)
                case Call(_, call, function):
                    self._blank, self._unsaid = "", []
                    yield from self._begin(CallItem(_new_id("fc"), call, function))
                case Arguments(_, text):
                    yield self._delta(text)

    def finish(self, status: EndStatus) -> Iterator[Event]:
        """No more comes; the item that is open ends with `status`. Without any there is a message of no text."""
        says_nothing = not self.items or (self._blank and not any(isinstance(one, CallItem) for one in self.items))
        if says_nothing:
            yield from self._begin(MessageItem(_new_id("msg")))
            if self._blank:
                yield self._delta(self._blank)
        self._logprobs += self._unsaid
        yield from self.close(status)

    @property
    def _open(self) -> Item | None:
        return self.items[-1] if self._is_open else None

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, MessageItem):
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return
            yield from self._begin(MessageItem(_new_id("msg")))
        yield self._delta(text)

    def _begin(self, item: Item) -> Iterator[Event]:
        yield from self.close("completed")
        self.items.append(item)
        self._texts, self._logprobs, self._is_open = [], [], True
        # Copies: the item grows before its events are written.
        yield ItemEvent(type="response.output_item.added", output_index=self._index, item=replace(item))
        match item:
            case MessageItem():
                yield self._part("added", OutputText())
            case ReasoningItem():
                yield self._part("added", ReasoningText())

    def _delta(self, text: str) -> Event:
        self._texts.append(text)
        item, index = self.items[-1], self._index
        match item:
            case CallItem():
                return ArgumentsDelta(item_id=item.id, output_index=index, delta=text)
            case ReasoningItem():
                return ReasoningDelta(item_id=item.id, output_index=index, delta=text)
        said, self._unsaid = self._unsaid, []
        self._logprobs += said
        return TextDelta(item_id=item.id, output_index=index, delta=text, logprobs=said)

    def close(self, status: EndStatus) -> Iterator[Event]:
        """End the item that is open, if one is."""
        item, text = self._open, "".join(self._texts)
        if item is None:
            return
        self._is_open = False
        index, item.status = self._index, status
        match item:
            case CallItem():
                item.arguments = text
                yield ArgumentsDone(item_id=item.id, output_index=index, name=item.name, arguments=text)
            case ReasoningItem():
                item.content = [ReasoningText(text)]
                yield ReasoningDone(item_id=item.id, output_index=index, text=text)
                yield self._part("done", item.content[0])
            case MessageItem():
                item.content = [OutputText(text, self._logprobs)]
                yield TextDone(item_id=item.id, output_index=index, text=text, logprobs=self._logprobs)
                yield self._part("done", item.content[0])
        yield ItemEvent(type="response.output_item.done", output_index=index, item=item)

    def _part(self, what: str, part: OutputText | ReasoningText) -> PartEvent:
        name = f"response.content_part.{what}"
        return PartEvent(type=name, item_id=self.items[-1].id, output_index=self._index, part=part)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"

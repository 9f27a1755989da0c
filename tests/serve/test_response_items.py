"""Items and events of a response, without a server: any pieces of a text give the same items, and events tell them."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.serve.parts import Arguments, Call, Content, Reasoning
from benthic.serve.response_items import OutputItems
from benthic.serve.response_wire import CallItem, MessageItem, ReasoningItem, TextDelta
from benthic.serve.wire import TokenLogprob


def plain(items):
    """Items without the ids that are new each time."""
    return [{name: value for name, value in msgspec.to_builtins(one).items() if name != "id"} for one in items]


def built(batches, status="completed", logprobs=()):
    items, events = OutputItems(), []
    for batch in batches:
        events += items.add(batch, list(logprobs))
    return items.items, [*events, *items.finish(status)]


WHOLE = [
    Reasoning("because"),
    Content("\n"),
    Content("so\n"),
    Call(0, "call_1", "now"),
    Arguments(0, '{"a"'),
    Arguments(0, ": 1}"),
    Content(" \n"),
    Call(1, "call_2", "later"),
    Arguments(1, "{}"),
]


def test_parts_become_items_in_their_order_without_blanks_between_calls():
    items, events = built([WHOLE])
    assert [type(one) for one in items] == [ReasoningItem, MessageItem, CallItem, CallItem]
    thought, message, first, second = items
    assert thought.content[0].text == "because"
    assert message.content[0].text == "\nso\n"
    assert (first.call_id, first.name, first.arguments) == ("call_1", "now", '{"a": 1}')
    assert second.arguments == "{}"
    assert {one.status for one in items} == {"completed"}
    assert [one.output_index for one in events] == sorted(one.output_index for one in events)
    assert len({one.id for one in items}) == 4


@given(st.data())
def test_any_pieces_of_a_text_give_the_same_items_and_the_events_tell_them_all(data):
    pieces = []
    for part in WHOLE:
        text = getattr(part, "text", None)
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=3))) if text else []
        bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)] if text else []
        pieces += [part._replace(text=text[a:b]) for a, b in pairwise(bounds)] if text else [part]
    batches = [[]]
    for piece in pieces:
        batches += [[]] if data.draw(st.booleans()) else []
        batches[-1].append(piece)
    items, events = built(batches)
    assert plain(items) == plain(built([WHOLE])[0])
    for index, item in enumerate(items):
        mine = [one for one in events if one.output_index == index]
        told = "".join(one.delta for one in mine if hasattr(one, "delta"))
        assert told == (item.arguments if isinstance(item, CallItem) else item.content[0].text)
        assert mine[-1].item == item
        assert mine[0].item.status == "in_progress"


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ([], ["message"]),
        ([Content(" ")], ["message"]),
        ([Reasoning("x")], ["reasoning"]),
        ([Reasoning("x"), Content("\n")], ["reasoning", "message"]),
        ([Call(0, "c", "f"), Arguments(0, "{}"), Content("\n")], ["function_call"]),
    ],
)
def test_an_answer_of_nothing_is_a_message_and_a_blank_behind_a_call_is_none(parts, kinds):
    items, _ = built([parts], "incomplete")
    assert [one["type"] for one in plain(items)] == kinds
    assert items[-1].status == "incomplete"


def test_logprobs_stay_with_the_text_they_are_of():
    one = TokenLogprob("x", -1.0, [120], [])
    items, events = built([[Reasoning("t")], [Content(" ")], [Content("a")], [Content("b")]], logprobs=[one])
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert "".join(event.delta for event in deltas) == " ab"
    assert sum(len(event.logprobs) for event in deltas) == len(items[1].content[0].logprobs) == 4

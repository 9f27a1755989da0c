"""Answers told apart into thought, content and calls: the same whatever the pieces in which the text comes."""

from __future__ import annotations

import json
import random

import pytest

from benthic.serve.answer_parts import AnswerParts
from benthic.serve.parts import Arguments, Call, Content, Reasoning
from benthic.serve.tool_text import LONGEST_HEADER
from benthic.text import Detokenizer, train_tokenizer
from benthic.text.tool_format import KIMI, V3, V31, tool_format

FORMATS = [V3, V31, KIMI]


class Spelling:
    """A tokenizer whose prompt's end is given."""

    def __init__(self, tail):
        self.tail = tail

    def decode(self, ids):
        return self.tail


def parts_of(pieces, tail="<｜Assistant｜>", tools=None):
    """Reasoning, content, and calls as (name, arguments), of an answer that comes in `pieces`."""
    answer = AnswerParts(Spelling(tail), [], tools)
    found = [part for piece in pieces for part in answer.add(piece)] + answer.finish()
    reasoning = "".join(part.text for part in found if isinstance(part, Reasoning))
    content = "".join(part.text for part in found if isinstance(part, Content))
    calls = [[part.function, ""] for part in found if isinstance(part, Call)]
    for part in found:
        if isinstance(part, Arguments):
            calls[part.index][1] += part.text
        elif not isinstance(part, Call):
            assert part.text
    assert len(calls) == answer.calls
    return reasoning, content, [tuple(call) for call in calls]


def call(format_, name, arguments, number=0):
    return f"{format_.call_begin}{format_.header(name, number)}{format_.opening}{arguments}{format_.closings[0]}"


def section(format_, *calls):
    texts = [call(format_, name, arguments, number) for number, (name, arguments) in enumerate(calls)]
    return format_.begin + format_.between.join(texts) + format_.end


@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_calls_are_read_as_each_family_writes_them(format_):
    wanted = [("add", '{"a": 1}'), ("look.up-2", '{"text": "<｜x｜> ``` </think>"}')]
    assert parts_of(["Let me see." + section(format_, *wanted)], tools=format_) == ("", "Let me see.", wanted)


def test_the_formats_are_spelled_as_published():
    assert section(V3, ("f", "{}"), ("g", "{}")) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert section(V31, ("f", "{}")) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert section(KIMI, ("f", "{}"), ("g", "{}")) == (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )


def test_kimi_keeps_its_own_ids():
    answer = AnswerParts(Spelling(""), [], KIMI)
    found = answer.add(section(KIMI, ("f", "{}"), ("g", "{}")))
    assert [part.id for part in found if isinstance(part, Call)] == ["functions.f:0", "functions.g:1"]


def test_a_template_tells_its_format():
    assert tool_format("{{ messages }}") is None
    assert tool_format("{{ tools }}") is None
    assert tool_format("{{ tools }} <｜tool▁calls▁begin｜> ```json") is V3
    assert tool_format("{{ tools }} <｜tool▁calls▁begin｜>") is V31
    assert tool_format("{{ tools }} <|tool_calls_section_begin|>") is KIMI


@pytest.mark.parametrize(
    ("tail", "text", "wanted"),
    [
        ("<think>\n", "\nhm \n</think>\n\nYes", ("hm", "Yes")),
        ("<think>", "hm", ("hm", "")),
        ("<think>", "", ("", "")),
        ("<think>", "</think>Yes", ("", "Yes")),
        ("<think>", "a</think>b</think>c", ("a", "b</think>c")),
        ("<think>", "a </thin b", ("a </thin b", "")),
        ("</think>", "<think>a</think>b", ("", "<think>a</think>b")),
        ("<｜Assistant｜>", "\n<think>\nhm</think> Yes ", ("hm", "Yes ")),
        ("<｜Assistant｜>", "<thinker>", ("", "<thinker>")),
        ("<｜Assistant｜>", " <thi", ("", " <thi")),
        ("<｜Assistant｜>", "Yes </think> no", ("", "Yes </think> no")),
    ],
)
def test_a_thought_ends_where_its_mark_is_in_any_pieces(tail, text, wanted):
    for cut in range(len(text) + 1):
        assert parts_of([text[:cut], text[cut:]], tail)[:2] == wanted
    assert parts_of(list(text), tail)[:2] == wanted


@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_malformed_markup_is_content_and_nothing_is_lost(format_):
    begun = format_.begin + format_.call_begin
    for text, calls in [
        (begun + "f", 0),
        (begun + "two words here" + format_.call_end, 0),
        (begun + "x" * (LONGEST_HEADER + 1) + " and on", 0),
        ("before " + format_.begin[:-1], 0),
    ]:
        _, content, found = parts_of([text], tools=format_)
        assert len(found) == calls
        assert content.replace(format_.begin, "") == text.replace(format_.begin, "")
    _, content, found = parts_of([begun + format_.header("f", 0) + format_.opening + '{"a": 1'], tools=format_)
    assert (content, found) == ("", [("f", '{"a": 1')])
    _, content, found = parts_of([section(format_, ("f", "")) + " and more"], tools=format_)
    assert (content, found) == (" and more", [("f", "{}")])
    assert parts_of(list(section(format_, ("f", "{}"))), tools=None)[1] == section(format_, ("f", "{}"))


def some_text(random_):
    words = ["é", "<", "｜", "tool", "`", "```json", "\n", " ", "{", '"', "</think", "▁", "😀", "x", "functions.", ":0"]
    return "".join(random_.choice(words) for _ in range(random_.randrange(8)))


TOKENIZER = train_tokenizer(["x"], 270)
BYTE_TOKENS = {TOKENIZER.token_bytes(one): one for one in range(TOKENIZER.vocab_size)}


def texts_of(ids, cut):
    """Two pieces of bytes as the engine's detokeniser gives them: no piece has a part of a character."""
    detokenizer = Detokenizer(TOKENIZER)
    return [detokenizer.add(ids[:cut]), detokenizer.add(ids[cut:]), detokenizer.finish()]


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 20))])
def test_generated_answers_of_which_there_are_500_are_the_same_split_at_every_byte(seed):
    random_ = random.Random(seed)
    for _ in range(25):
        format_ = random_.choice(FORMATS)
        thought, before = some_text(random_), some_text(random_)
        calls = [
            (random_.choice(["add", "f.g", "a-b"]), json.dumps({"text": some_text(random_)}, ensure_ascii=False))
            for _ in range(random_.randrange(3))
        ]
        text = thought + "</think>" + before + (section(format_, *calls) if calls else "")
        tail = random_.choice(["<think>\n", "</think>"])
        whole = parts_of([text], tail, format_)
        if tail.startswith("<think>") and "</think>" not in thought:
            assert whole == (thought.strip(), before.lstrip(), calls)
        ids = [BYTE_TOKENS[bytes([one])] for one in text.encode()]
        for cut in range(len(ids) + 1):
            assert parts_of(texts_of(ids, cut), tail, format_) == whole
        assert parts_of(list(text), tail, format_) == whole


@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_words_between_calls_keep_their_spaces_in_any_pieces(format_):
    first, second = (call(format_, name, "{}", number) for number, name in enumerate("fg"))
    text = f"{format_.begin}{first}\nand then  this one: {second} {format_.end}"
    wanted = ("", "\nand then  this one:", [("f", "{}"), ("g", "{}")])
    assert parts_of([text], tools=format_) == wanted
    assert parts_of(text, tools=format_) == wanted


@pytest.mark.parametrize("more", range(-1, 3))
@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_a_header_is_as_long_as_it_is_in_any_pieces(format_, more):
    name = "f" * (LONGEST_HEADER + more - len(format_.header("", 0)))
    text = section(format_, (name, "{}"))
    whole = parts_of([text], tools=format_)
    assert parts_of(text, tools=format_) == whole
    assert bool(whole[2]) == (more <= 0)

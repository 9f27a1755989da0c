"""Streaming: whole characters only, and the pieces are the text."""

from hypothesis import given
from hypothesis import strategies as st

from benthic.text import Detokenizer


@given(st.lists(st.integers(0, 330), max_size=40), st.booleans())
def test_pieces_of_any_ids_join_to_their_decoding(tokenizer, ids, skip):
    stream = Detokenizer(tokenizer, skip_special=skip)
    pieces = [stream.add([one]) for one in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_streams_without_broken_characters(tokenizer, text):
    stream = Detokenizer(tokenizer)
    pieces = [stream.add([one]) for one in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_character_waits_for_its_last_byte(tokenizer):
    ids = [one for byte in "🎉".encode() for one in range(8, 264) if tokenizer.token_bytes(one) == bytes([byte])]
    stream = Detokenizer(tokenizer)
    assert [stream.add([one]) for one in ids] == ["", "", "", "🎉"]


def test_finish_gives_up_an_incomplete_character_and_starts_anew(tokenizer):
    first = next(one for one in range(8, 264) if tokenizer.token_bytes(one) == b"\xf0")
    stream = Detokenizer(tokenizer)
    assert stream.add([first]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.add(tokenizer.encode("ok")) == "ok"


def test_special_tokens_are_skipped_or_shown(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.eos_id]
    assert Detokenizer(tokenizer).add(ids) == "a"
    assert Detokenizer(tokenizer, skip_special=False).add(ids) == "a<｜end▁of▁sentence｜>"

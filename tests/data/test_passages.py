"""Long texts in parts: nothing lost, and the ids of the whole."""

import sysconfig
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benthic.data.passages import passages
from benthic.text import train_tokenizer

SOURCE = (Path(sysconfig.get_path("stdlib")) / "ast.py").read_text(encoding="utf-8")


@given(st.text(st.sampled_from("ab \n\t1,"), max_size=200), st.integers(1, 20), st.integers(20, 40))
def test_the_parts_are_the_text(text, size, longest):
    parts = list(passages(text, size, longest))
    assert "".join(parts) == text
    assert all(parts) or not text
    assert all(len(part) <= longest for part in parts)


def test_the_parts_have_the_ids_of_the_whole():
    tokenizer = train_tokenizer([SOURCE], 600)
    parts = list(passages(SOURCE, 200, 100_000))
    assert len(parts) > 5
    assert [one for part in parts for one in tokenizer.encode(part)] == tokenizer.encode(SOURCE)


def test_gpt2s_pre_tokenizer_cuts_there_too():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()

    def words(text):
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    parts = list(passages(SOURCE, 200, 100_000))
    assert [word for part in parts for word in words(part)] == words(SOURCE)


def test_a_line_without_end_is_cut_where_it_must_be():
    assert [len(part) for part in passages("x" * 100, 10, 30)] == [30, 30, 30, 10]

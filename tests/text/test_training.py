"""Training: the same tokenizer every time, the right special tokens, clear refusals."""

import os
import subprocess
import sys

import pytest

from benthic.errors import TextError
from benthic.text import train_tokenizer
from benthic.text.training import SPECIAL_TOKENS

CODE = """
from benthic.text import train_tokenizer
texts = [f"value_{i} = {i * 7919} + other_{i % 7}\\n" * (i % 5 + 1) for i in range(200)]
print(train_tokenizer(texts, 500).fingerprint)
"""


def test_training_does_not_depend_on_the_number_of_threads():
    found = set()
    for threads in ("1", "2"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", CODE]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


def test_special_tokens_have_the_published_spelling():
    for token in SPECIAL_TOKENS:
        assert token[1] == token[-2] == "\uff5c"
        assert "_" not in token
    assert SPECIAL_TOKENS[0] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def test_the_vocabulary_is_as_large_as_asked_or_as_the_text_allows():
    assert train_tokenizer(["the cat and the hat, the bat and the rat " * 9], 270).vocab_size == 270
    assert train_tokenizer(["ab"], 5000).vocab_size == 265


def test_digits_are_split_in_threes_and_spaces_join_words():
    tokenizer = train_tokenizer(["1234567 is it, is it " * 50], 300)
    pieces = [tokenizer.decode([one]) for one in tokenizer.encode("1234567 is")]
    assert pieces == ["123", "456", "7", " is"]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(texts):
    with pytest.raises(TextError, match="no text to train a tokenizer on"):
        train_tokenizer(texts, 300)


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(
        TextError, match="vocab_size 100 is too small: 8 special tokens and 256 bytes need at least 264"
    ):
        train_tokenizer(["text"], 100)

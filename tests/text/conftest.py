import pytest

from benthic.text import Tokenizer, train_tokenizer

TEXTS = [
    "def add(left, right):\n    return left + right\n" * 4,
    "The quick brown fox jumps over the lazy dog, 12345 times.\n" * 3,
    "Grüße, 你好世界, こんにちは, 🎉🎉\r\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(made)
    return made

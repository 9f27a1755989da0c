"""Token files: a split of a corpus as one memory-mapped stream of ids.

    train.bin   ids, uint16 (vocabularies up to 65,536) or uint32, little-endian, document after document
    train.idx   int64, where each document begins, and the end

A document is [BOS] ids [EOS], as far as the tokenizer has them. Both files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from benthic.config.settings import Settings
from benthic.data.fim import Pieces, arranged
from benthic.data.passages import passages
from benthic.errors import DataError
from benthic.text import Tokenizer

REBUILD = "delete the folder to prepare the data again"

_GROUP = 256
"""Passages tokenised at once: enough for every core, some 16 MB of text at most."""


class SplitFacts(Settings):
    """What the manifest says of one split."""

    tokens: int
    documents: int
    text_bytes: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class TokenFile:
    """One split, open for reading; nothing is loaded before it is asked for."""

    path: Path
    facts: SplitFacts

    @classmethod
    def open(cls, folder: Path, name: str, facts: SplitFacts) -> TokenFile:
        """The split `name` of `folder`; DataError when its files are missing or not as long as `facts` say."""
        found = cls(folder / f"{name}.bin", facts)
        sizes = {
            found.path: facts.tokens * np.dtype(facts.dtype).itemsize,
            found.path.with_suffix(".idx"): (facts.documents + 1) * 8,
        }
        for path, size in sizes.items():
            if not path.is_file():
                raise DataError(f"{path} is missing", hint=REBUILD)
            if path.stat().st_size != size:
                raise DataError(f"{path} has {path.stat().st_size} bytes; its manifest says {size}", hint=REBUILD)
        return found

    @cached_property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """ids [tokens], mapped from disk."""
        return np.memmap(self.path, dtype=np.dtype(self.facts.dtype), mode="r")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [documents + 1]: where documents begin, and the end."""
        return np.memmap(self.path.with_suffix(".idx"), dtype="<i8", mode="r")

    def verify(self) -> None:
        """Read everything and compare with the manifest's hash."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.facts.sha256:
            raise DataError(f"{self.path} was changed after it was written (its sha256 differs)", hint=REBUILD)


class TokenWriter:
    """Appends documents to the two open files of one split."""

    def __init__(self, bin_file: BinaryIO, idx_file: BinaryIO, tokenizer: Tokenizer) -> None:
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise DataError(
                f"tokenizer {tokenizer.origin} names neither bos_token nor eos_token; nothing would part documents",
                hint="name one of them in its tokenizer_config.json",
            )
        self._bin, self._idx = bin_file, idx_file
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
        self._head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._digest = hashlib.sha256()
        self._tokens = self._documents = self._text_bytes = 0
        self._idx.write(np.zeros(1, dtype="<i8").tobytes())

    def write(self, texts: Iterable[str | Pieces]) -> None:
        """Tokenise a batch of documents and append it; one cut in pieces is rearranged to fill in the middle."""
        texts = list(texts)
        encoded = self._encode([string for text in texts for string in _strings(text)])
        ids = [self._document(text, encoded) for text in texts]
        content = b"".join(one.tobytes() for one in ids)
        self._bin.write(content)
        self._digest.update(content)
        ends = self._tokens + np.cumsum([len(one) for one in ids], dtype="<i8")
        self._idx.write(ends.tobytes())
        self._tokens += sum(map(len, ids))
        self._documents += len(ids)
        self._text_bytes += sum(len(string.encode()) for text in texts for string in _strings(text))

    def _encode(self, strings: list[str]) -> Iterator[NDArray[np.unsignedinteger]]:
        """Ids of each string, in groups of passages; lists of Python integers are kept for one group only."""
        parts = [list(passages(string)) for string in strings]
        flat = [passage for part in parts for passage in part]
        groups = (flat[first : first + _GROUP] for first in range(0, len(flat), _GROUP))
        encoded = (np.asarray(ids, self._dtype) for group in groups for ids in self._tokenizer.encode_batch(group))
        for part in parts:
            yield np.concatenate([next(encoded) for _ in part])

    def _document(
        self, text: str | Pieces, encoded: Iterator[NDArray[np.unsignedinteger]]
    ) -> NDArray[np.unsignedinteger]:
        parts = [next(encoded) for _ in _strings(text)]
        if isinstance(text, Pieces):
            parts = arranged(parts[0], parts[1], parts[2], self._tokenizer.fim_ids)
        return np.concatenate([np.asarray(part, self._dtype) for part in (self._head, *parts, self._tail)])

    def facts(self) -> SplitFacts:
        """What has been written so far."""
        return SplitFacts(
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            dtype=self._dtype.str,
            sha256=self._digest.hexdigest(),
        )


def _strings(text: str | Pieces) -> tuple[str, ...]:
    return (text.prefix, text.middle, text.suffix) if isinstance(text, Pieces) else (text,)

"""Dataset: a folder of prepared tokens, opened.

manifest.json     what was prepared from what: source, tokenizer, counts, hashes
documents.jsonl   one line a document: name, split, bytes, sha256
tokenizer/        the tokenizer the ids belong to
train.bin .idx    the splits (tokens.py)
validation.bin .idx
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benthic.config.settings import Settings
from benthic.data.splits import Split
from benthic.data.tokens import REBUILD, SplitFacts, TokenFile
from benthic.errors import ConfigError, DataError
from benthic.text import Tokenizer

VERSION = 1
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.jsonl"
TOKENIZER_FOLDER = "tokenizer"


class Manifest(Settings):
    """What a folder of tokens was made from."""

    version: int
    key: str
    """sha256 of everything that decides the tokens; equal keys, equal files."""
    source: str
    python: str
    tokenizer: str
    """Its fingerprint."""
    documents_sha256: str
    train: SplitFacts
    validation: SplitFacts


@dataclass(frozen=True)
class Dataset:
    """Both splits of a corpus and the tokenizer of their ids."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> Dataset:
        """Open a prepared folder; sizes are always checked, hashes when asked. Raises DataError."""
        folder = Path(folder)
        manifest = _manifest(folder / MANIFEST_FILE)
        tokenizer = Tokenizer.from_folder(folder / TOKENIZER_FOLDER)
        if tokenizer.fingerprint != manifest.tokenizer:
            raise DataError(f"{folder / TOKENIZER_FOLDER} is not the tokenizer these ids were made with", hint=REBUILD)
        train = TokenFile.open(folder, "train", manifest.train)
        validation = TokenFile.open(folder, "validation", manifest.validation)
        if verify:
            train.verify()
            validation.verify()
        return cls(folder, manifest, tokenizer, train, validation)

    @cached_property
    def token_bytes(self) -> Tensor:
        """int64 [V]: how many bytes of text each id stands for; special tokens none."""
        sizes = [len(self.tokenizer.token_bytes(index)) for index in range(self.tokenizer.vocab_size)]
        for index in self.tokenizer.special_ids:
            sizes[index] = 0
        return torch.tensor(sizes)

    def text(self, split: Split) -> bytes:
        """The text of a split, documents joined, rebuilt from its ids."""
        source = self.train if split == "train" else self.validation
        return self.tokenizer.decode_bytes(source.tokens.tolist(), skip_special=True)


def _manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", hint=REBUILD) from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise DataError(f"{path} has version {found}; this benthic reads {VERSION}", hint=REBUILD)
    try:
        return Manifest(**content)
    except ConfigError as error:
        raise DataError(f"{path}: {error.message}", hint=REBUILD) from None

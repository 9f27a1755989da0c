"""Which documents are held out. Decided by the hash of a name, so that a growing corpus keeps its split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Literal

from benthic.data.sources import Document

Split = Literal["train", "validation"]

FEW = 20
"""A corpus of fewer documents than this is not divided by name: each document gives its last lines."""


def split(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Split, Document]]:
    """Every document that is not empty and not seen before, with its split."""
    kept = _distinct(documents)
    first = list(islice(kept, FEW))
    if len(first) < FEW:
        for document in first:
            yield from _cut(document, fraction)
        return
    for document in chain(first, kept):
        yield ("validation" if _share(document.name) < fraction else "train"), document


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(errors="surrogatepass"), digest_size=16).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def _share(name: str) -> float:
    """A number in [0, 1) that the name alone decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / (1 << 56)


def _cut(document: Document, fraction: float) -> Iterator[tuple[Split, Document]]:
    """The document in two at a line's end near `1 - fraction`; a text of one line is cut inside it."""
    aim = int(len(document.text) * (1 - fraction))
    line = document.text.rfind("\n", 0, aim) + 1
    place = line or aim
    yield "train", Document(document.name, document.text[:place])
    yield "validation", Document(f"{document.name} (end)", document.text[place:])

"""Which documents are held out. Decided by the hash of a name, so that a growing corpus keeps its split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Literal

from benthic.data.sources import Document

Split = Literal["train", "validation"]

LEAST_HELD_OUT = 8
"""Where fewer documents than this are to be expected in validation, each document gives its last lines instead."""


def split(read: Callable[[], Iterable[Document]], fraction: float) -> Iterator[tuple[Split, Document]]:
    """Every document of `read()` that is not empty and not seen before, with its split."""
    enough = int(LEAST_HELD_OUT / fraction)
    if sum(1 for _ in islice(_distinct(read()), enough)) < enough:
        for document in _distinct(read()):
            yield from _cut(document, fraction)
        return
    for document in _distinct(read()):
        yield ("validation" if _share(document.name) < fraction else "train"), document


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
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

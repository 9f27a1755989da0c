"""Fill in the middle: a document rearranged so that its middle comes last (Bavarian et al., arXiv:2207.14255).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle        (PSM, at document level: arXiv:2412.19437, section 4.1)

Cut at characters, so that the middle begins and ends where an editor's cursor may stand. Which documents, and where, is
decided by the seed and the name alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benthic.data.sources import Document
from benthic.data.splitmix import Draws

Ids = Sequence[int] | NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Pieces:
    """prefix + middle + suffix is the document."""

    prefix: str
    middle: str
    suffix: str


def pieces(document: Document, rate: float, seed: int) -> Pieces | None:
    """The document cut at two uniform places, or None for the 1 - rate of documents that stay as they are."""
    name = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8])
    draws = Draws(seed, name)
    if not draws.chance(rate):
        return None
    text = document.text
    first, last = sorted(draws.below(len(text) + 1) for _ in range(2))
    return Pieces(text[:first], text[first:last], text[last:])


def arranged(prefix: Ids, middle: Ids, suffix: Ids, fim_ids: tuple[int, int, int]) -> list[Ids]:
    """The three pieces in PSM order between `fim_ids` (begin, hole, end), to be joined."""
    begin, hole, end = fim_ids
    return [[begin], prefix, [hole], suffix, [end], middle]

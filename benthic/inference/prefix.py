"""Prefix: what a full block of the cache stands for, which is its tokens and all before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class Prefix:
    """A sequence's beginning, up to the end of one of its blocks: `content` behind `parent`; the first has a salt for
    its content and no parent, so that sequences of different salts never share.

    Two are equal where all contents are. The hash, which only finds candidates, is kept: it costs one block. So does a
    comparison of prefixes that have a parent in common, and those who go on behind a found one see to that.
    """

    __slots__ = ("_hash", "content", "parent")

    def __init__(self, parent: Prefix | None, content: bytes) -> None:
        self.parent, self.content = parent, content
        self._hash = hash_of(parent, content)

    def followed_by(self, tokens: Sequence[int]) -> Prefix:
        """One block more."""
        return Prefix(self, array("I", tokens).tobytes())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine: Prefix | None = self
        theirs = other if isinstance(other, Prefix) else None
        while mine is not theirs:
            if mine is None or theirs is None or mine.content != theirs.content:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


def hash_of(parent: Prefix | None, content: bytes) -> int:
    """Python's keyed hash: who does not know the key finds no two contents of one hash."""
    return hash((hash(parent), content))


def salted(salt: str) -> Prefix:
    """The parent of a sequence's first block."""
    return Prefix(None, salt.encode(errors="surrogatepass"))

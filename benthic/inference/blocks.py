"""Who holds which block of the paged cache, and which blocks remember a prefix that may come again.

A block is in one of three states: free; referenced, by one sequence or several with an equal beginning; or cached: no
sequence holds it, but its content is known and is given up only when a block is needed: of those of the owner who has
the most, the one that was longest unused. So nobody who fills the cache drives others out of their share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from benthic.inference.prefix import Prefix


class BlockPool:
    """`size` blocks, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._references = [0] * size
        self._cached: dict[str, OrderedDict[int, None]] = {}  # by owner
        self._owner_of: dict[int, str] = {}
        self._known: dict[Prefix, int] = {}
        self._prefix_of: dict[int, Prefix] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._free) + sum(map(len, self._cached.values()))

    @property
    def referenced(self) -> int:
        """Blocks that sequences hold."""
        return self.size - self.available

    def take(self) -> int:
        """A block of unknown content, referenced once; `available` must not be 0."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = max(self._cached.values(), key=len).popitem(last=False)
            del self._known[self._prefix_of.pop(block)], self._owner_of[block]
        self._references[block] = 1
        return block

    def find(self, prefix: Prefix) -> int | None:
        """The block of that content, if one is known."""
        return self._known.get(prefix)

    def prefix_of(self, block: int) -> Prefix:
        """What a block that `find` gave is known as: equal to what was asked for."""
        return self._prefix_of[block]

    def is_cached(self, block: int) -> bool:
        """Whether no sequence holds a known block, so that sharing it leaves one fewer to take."""
        return block in self._prefix_of and not self._references[block]

    def share(self, block: int) -> None:
        """One more reference to a block that `find` gave."""
        if not self._references[block]:
            del self._cached[self._owner_of[block]][block]
        self._references[block] += 1

    def publish(self, block: int, prefix: Prefix, owner: str = "") -> Prefix:
        """Let others find a full block that will not change any more, which counts as its `owner`'s; the first of equal
        blocks stays the known one. Returns what that is known as."""
        known = self._known.get(prefix)
        if known is not None:
            return self._prefix_of[known]
        if block not in self._prefix_of:
            self._known[prefix] = block
            self._prefix_of[block] = prefix
            self._owner_of[block] = owner
        return prefix

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each of a sequence's `blocks`, in the order of its tokens."""
        # Last first: of a chain the end is given up before the beginning, without which it is of no use.
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._prefix_of:
                    self._cached.setdefault(self._owner_of[block], OrderedDict())[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Free every cached block, and let no referenced one be found: the model's weights changed."""
        self._free.extend(block for mine in self._cached.values() for block in mine)
        self._cached.clear()
        self._known.clear()
        self._prefix_of.clear()
        self._owner_of.clear()

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every block is in one state, and references are those of the sequences that hold
        the blocks `held`."""
        counted = [0] * self.size
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        assert counted == self._references, f"references are {self._references}, held are {counted}"
        free, cached = set(self._free), {block for mine in self._cached.values() for block in mine}
        used = {block for block, count in enumerate(counted) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached | cached & used | free & used, "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.size, "a block is lost"
        assert cached <= set(self._prefix_of), "a cached block has no prefix"
        assert {block: prefix for prefix, block in self._known.items()} == self._prefix_of, "prefixes disagree"

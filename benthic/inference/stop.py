"""Text up to the first stop string, piece by piece: what could be the start of one is held back until it is not."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """The state of one stream of text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """What of the text so far is safe to show; nothing more once `found` is a stop string."""
        if self.found is not None:
            return ""
        self._held += piece
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda pair: (pair[0], -len(pair[1])))
            return self._give(place)
        return self._give(len(self._held) - self._start_of_a_stop())

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found is not None else self._give(len(self._held))

    def _give(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        return safe

    def _start_of_a_stop(self) -> int:
        """Length of the longest end of the held text that starts a stop string."""
        sizes = (
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)

"""Whether drafts pay, by the clock.

A draft costs a prediction layer's call and one more token of the main model's, which is little where weights set the
pace and much where arithmetic does. So steps of both kinds are timed: of the first TRIAL, and of every RECHECK later,
one in so many goes without its drafts. Where drafted steps bring fewer tokens a second, by medians over the last
WINDOW of each kind, drafting rests for REST steps, prediction layers and all; then the next requests to come try
again. Answers are the same with drafts and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, median

from benthic.inference.request import Request
from benthic.inference.scheduler import Work

WINDOW = 16
TRIAL = 24
"""Timed steps until the first verdict, every fourth of them without drafts."""
RECHECK = 32
REST = 1024
"""A trial costs at most about what TRIAL plain steps cost: under 3% of these."""


class _Rate:
    """Tokens a second over the last steps of one kind."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._tokens: deque[int] = deque(maxlen=WINDOW)

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds.append(seconds)
        self._tokens.append(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def value(self) -> float:
        """One long step, a graph captured or another program's turn, does not move a median."""
        return fmean(self._tokens) / max(median(self._seconds), 1e-9)


class Pace:
    """The verdict so far; with `judges` False drafting never rests."""

    def __init__(self, judges: bool) -> None:
        self._judges, self.drafting = judges, True
        self._resting = 0
        self._begin_trial()

    def prepare(self, running: Sequence[Request]) -> None:
        """Before a step: take the drafts away where it is time to see what steps without them take."""
        if self._judges and self.drafting:
            self._begun += 1
            if self._begun % (4 if self._timed < TRIAL else RECHECK) == 0:
                for request in running:
                    request.drafts = []

    def note(self, works: Sequence[Work], tokens: int, main_seconds: float, seconds: float) -> None:
        """After a step that drew `tokens`: its time without the prediction layers' part, and with it."""
        if not self._judges:
            return
        if not self.drafting:
            self._resting += 1
            if self._resting == REST:
                self.drafting = True
                self._begin_trial()
        elif all(work.count == 1 for work in works):
            self._note(works, tokens, main_seconds, seconds)

    def _note(self, works: Sequence[Work], tokens: int, main_seconds: float, seconds: float) -> None:
        if all(work.drafts for work in works):
            self._drafted.add(seconds, tokens)
        elif not any(work.drafts for work in works):
            self._plain.add(main_seconds, tokens)
        elif self._timed >= TRIAL:
            return
        # In a trial mixed steps count too: where nothing else comes, it ends without a verdict for drafts.
        self._timed += 1
        if self._timed >= TRIAL and not self._pays():
            self.drafting, self._resting = False, 0

    def _pays(self) -> bool:
        return bool(self._drafted) and (not self._plain or self._drafted.value >= self._plain.value)

    def _begin_trial(self) -> None:
        self._begun = self._timed = 0
        self._plain, self._drafted = _Rate(), _Rate()

"""What an engine did so far, and what it is busy with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benthic.inference.completion import Completion


@dataclass(slots=True)
class Statistics:
    """Sums since the engine was made, over finished answers; and as they are now, `waiting` and `running` requests and
    `free_blocks` of `blocks`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    running: int = 0
    blocks: int = 0
    free_blocks: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of drafts that were right; None before the first."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    def add(self, completion: Completion) -> None:
        """Count a finished answer."""
        self.prompt_tokens += len(completion.prompt_token_ids)
        self.cached_tokens += completion.cached_tokens
        self.completion_tokens += len(completion.token_ids)
        self.drafted_tokens += completion.drafted_tokens
        self.accepted_tokens += completion.accepted_tokens
        self.finished[completion.finish_reason or "error"] += 1

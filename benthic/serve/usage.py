"""Tokens of one HTTP request, counted as its answers come."""

from __future__ import annotations

from benthic.serve.messages import Delta
from benthic.serve.wire import CompletionDetails, PromptDetails, Usage


class Counter:
    """Counts `prompts`' tokens once, however many answers each gets."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = self.reasoning_tokens = 0
        self._cached: dict[int, int] = {}
        self._drafted = self._accepted = 0

    def add(self, delta: Delta, reasoning: bool = False) -> None:
        """One delta's tokens, and what the end of an answer tells."""
        self.completion_tokens += len(delta.token_ids)
        self.reasoning_tokens += len(delta.token_ids) * reasoning
        if delta.finish is not None:
            # Answers behind the first find the prompt that it computed: only the first tells what was there before.
            self._cached[delta.request] = min(
                self._cached.get(delta.request, self.prompt_tokens), delta.finish.cached_tokens
            )
            self._drafted += delta.finish.drafted_tokens
            self._accepted += delta.finish.accepted_tokens

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            PromptDetails(sum(self._cached.values())),
            CompletionDetails(self.reasoning_tokens, self._accepted, self._drafted - self._accepted),
        )

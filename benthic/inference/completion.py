"""What a request comes back with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(slots=True)
class Completion:
    """One answer to one prompt, complete once `finish_reason` is set.

    `token_ids` are the drawn tokens without the one that ended the text, `logprobs` the model's log-probability of each
    before temperature and penalties, and `text` ends before a stop string, whose tokens are still in `token_ids`.
    `stop_reason` is the token or string that ended the text. `top_logprobs` holds the likeliest alternatives of each
    token where they were asked for; those of the prompt start with None, as nothing predicts the first token.
    `routed_experts` int16 [tokens, expert layers, K] are the choices for every token that went through the model.
    `cached_tokens` of the prompt were found in the cache; `accepted_tokens` of `drafted_tokens` drafts were right.
    """

    prompt_token_ids: list[int]
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    routed_experts: Tensor | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What one step added to one request: tokens, and the text that is safe to show. The last one has the finished
    `completion`'s reason."""

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    completion: Completion

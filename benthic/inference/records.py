"""What a request may want to know about every token that went through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.inference.drawing import likeliest
from benthic.inference.request import Request
from benthic.inference.runner import Runner, log_probabilities
from benthic.ops.route import Routing

_ROWS_AT_ONCE = 512
"""Logits of a long prompt can be larger than the model."""


def keep_prompt_logprobs(request: Request, hidden: Tensor, runner: Runner) -> None:
    """Log-probabilities of the prompt's tokens that the states `hidden` [n, D] of its next n tokens predict."""
    wanted, completion = request.params.prompt_logprobs, request.completion
    first = request.computed + 1
    targets = request.tokens[first : min(first + len(hidden), request.prompt_length)]
    # A request that was put back goes through its prompt again: what it found before is replaced.
    logprobs = (completion.prompt_logprobs or [None])[:first]
    alternatives = (completion.prompt_top_logprobs or [None])[:first]
    for begin in range(0, len(targets), _ROWS_AT_ONCE):
        part = torch.tensor(targets[begin : begin + _ROWS_AT_ONCE], device=hidden.device)
        logits = runner.logits(hidden[begin : begin + len(part)])
        logprobs += log_probabilities(logits, part).tolist()
        alternatives += likeliest(logits, [wanted] * len(part))
    if targets or first == 1:
        completion.prompt_logprobs, completion.prompt_top_logprobs = logprobs, alternatives


def keep_routes(request: Request, routing: dict[int, Routing], rows: slice) -> None:
    """The experts that its next tokens, `rows` of the step, were sent to."""
    if not routing:
        return
    chosen = torch.stack([routing[layer].experts[rows] for layer in sorted(routing)], 1).to("cpu", torch.int16)
    known = request.completion.routed_experts
    request.completion.routed_experts = chosen if known is None else torch.cat((known[: request.computed], chosen))

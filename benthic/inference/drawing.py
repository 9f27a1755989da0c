"""Tokens for all rows of a step at once, each by its own request's wishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.inference.readback import Readback
from benthic.inference.runner import Computed, Likeliest, Runner, likeliest_of, told_of
from benthic.inference.scheduler import Work
from benthic.model.sampling import Sampler, distributions, pick, to_device


class Row(NamedTuple):
    """One token to draw: `drafts` are taken as drawn before it, and `allowed` bool [V] bounds the choice."""

    sampler: Sampler
    drafts: tuple[int, ...] = ()
    allowed: Tensor | None = None


class Drawn(NamedTuple):
    """A drawn token, its log-probability by the model alone, and the likeliest alternatives if any were asked for.
    `token` is None where nothing can be drawn: all is forbidden, or the logits are no numbers."""

    token: int | None
    logprob: float
    alternatives: dict[int, float] | None


class Draws(NamedTuple):
    """A step's tokens, drawn on the device: `tokens` int64 [R], and what is told of them on its way to the host."""

    rows: list[Row]
    counts: list[int]
    tokens: Tensor
    told: Readback
    alternatives: list[dict[int, float] | None]


def draw_works(runner: Runner, works: Sequence[Work], computed: Computed, ahead: int = 0) -> Draws | None:
    """Begin to draw, for each piece of work, the tokens that follow its last one and each of its drafts; none where
    more of the prompt is to come. `ahead` tokens of every request are drawn but not yet known."""
    places, rows, counts = [], [], []
    for (request, count, drafts), mine in zip(works, computed.rows, strict=True):
        wanted = 1 + len(drafts) if ahead or count == request.remaining else 0
        counts.append(wanted)
        places += range(mine.stop - wanted, mine.stop)
        if request.form is None or not wanted:
            rows += [Row(request.sampler, (0,) * ahead + drafts[:place]) for place in range(wanted)]
        else:
            masks = request.form.allowed(drafts)
            rows += [Row(request.sampler, drafts[:place], masks[place]) for place in range(wanted)]
    if not rows:
        return None
    if computed.logits is None or len(places) != len(computed.logits):
        logits, likeliest_ones = runner.logits(runner.take_rows(computed.hidden, places)), None
    else:
        logits, likeliest_ones = computed.logits, computed.likeliest
    return _draw(logits, likeliest_ones, rows, counts)


def read_draws(draws: Draws | None, works: Sequence[Work]) -> list[list[Drawn]]:
    """Wait for what was drawn: tokens by piece of work."""
    if draws is None:
        return [[] for _ in works]
    told = draws.told.wait().tolist()
    drawn = iter(
        [
            Drawn(int(token) if fine and math.isfinite(logprob) else None, logprob, other)
            for token, logprob, fine, other in zip(*told, draws.alternatives, strict=True)
        ]
    )
    return [[next(drawn) for _ in range(count)] for count in draws.counts]


def _draw(logits: Tensor, likeliest_ones: Likeliest | None, rows: list[Row], counts: list[int]) -> Draws:
    """One token for each row of `logits` [R, V]."""
    choice = _choice(logits, rows)
    if choice is logits and not any(row.sampler.params.temperature > 0 for row in rows):
        tokens, told = likeliest_ones or likeliest_of(logits)
    else:
        tokens = _tokens(choice, rows)
        told = told_of(logits, tokens)
        if choice is not logits:
            # A forbidden token wins where there is no other.
            told[2] = choice.amax(-1).isfinite()
    wanted = [row.sampler.params.logprobs for row in rows]
    return Draws(rows, counts, tokens, Readback(told), likeliest(logits, wanted))


def likeliest(logits: Tensor, wanted: Sequence[int | None]) -> list[dict[int, float] | None]:
    """The likeliest tokens of each row with their log-probabilities, as many as `wanted`; None for 0 or None."""
    most = max((count or 0 for count in wanted), default=0)
    if not most:
        return [None] * len(wanted)
    values, tokens = logits.float().log_softmax(-1).topk(min(most, logits.shape[-1]))
    pairs = zip(wanted, tokens.tolist(), values.tolist(), strict=True)
    return [dict(zip(ids[:count], row[:count], strict=True)) if count else None for count, ids, row in pairs]


def _choice(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits as the requests change them."""
    changed = [index for index, row in enumerate(rows) if row.sampler.params.changes_logits or row.allowed is not None]
    if not changed:
        return logits
    choice = logits.float()
    choice = choice.clone() if choice is logits else choice
    for index in changed:
        sampler, drafts, allowed = rows[index]
        if sampler.params.changes_logits:
            choice[index] = sampler.changed(logits[index], drafts)
        if allowed is not None:
            choice[index].masked_fill_(~allowed.to(choice.device), -torch.inf)
    return choice


def _tokens(choice: Tensor, rows: Sequence[Row]) -> Tensor:
    tokens = choice.argmax(-1)
    random = [index for index, row in enumerate(rows) if row.sampler.params.temperature > 0]
    if random:
        samplers = [rows[index].sampler for index in random]
        uniforms = [
            sampler.uniform(len(sampler.drawn) + len(rows[index].drafts))
            for index, sampler in zip(random, samplers, strict=True)
        ]
        where = to_device(random, torch.int64, choice.device)
        probabilities = distributions(choice[where], [sampler.params for sampler in samplers])
        tokens[where] = pick(probabilities, uniforms).clamp_(max=choice.shape[-1] - 1)
    return tokens

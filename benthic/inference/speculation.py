"""Drafts by the prediction layers (MTP), for the main model to judge in its next call.

Layer k turns the state before it and token p into a state that predicts token p + 1 (DeepSeek-V3, section 2.2), and
keeps a row of its own at p, which depends on no later token. So the layers follow the main model by rule: once it has
seen positions up to e - 1 and token e is known, all of them hold rows up to e. Behind e they run on their own drafts;
those rows are written again when the tokens are known. Where drafts are wanted deeper than there are layers, the last
one is chained on its own state.

A draft is the likeliest token, and it is right where the main model draws the same token at that place from its own
random number: the answer is token for token what plain decoding gives, and a draft of probability p is right with
probability p, as in rejection sampling (arXiv:2302.01318) of a draft that is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.inference.batch import Stretch
from benthic.inference.pace import Pace
from benthic.inference.request import Request
from benthic.inference.runner import Runner, likeliest_of


class News(NamedTuple):
    """The main model has seen `count` tokens from `start` on; their states are the step's rows from `row` on. `wanted`
    drafts are of use."""

    request: Request
    start: int
    count: int
    row: int
    wanted: int

    @property
    def last(self) -> int:
        """The position of the last known token."""
        return self.start + self.count


class _Level:
    """This step's states [n, D] before the first layer (level 0) or behind layer `level`. Position p of a request is
    row `offsets[id] + p`, from `begins[id]` on; the position before that is what the request carries."""

    def __init__(self, level: int, states: Tensor) -> None:
        self.level, self.states = level, states
        self.offsets: dict[int, int] = {}
        self.begins: dict[int, int] = {}
        self._extra: list[Tensor] = []

    def add(self, request: Request, begin: int, row: int) -> None:
        """Positions of a request from `begin` on stand in rows from `row` on."""
        self.offsets[request.id], self.begins[request.id] = row - begin, begin

    def rows(self, request: Request, positions: range) -> list[int]:
        """Where the states of `positions` are."""
        offset, found = self.offsets.get(request.id, 0), []
        for position in positions:
            if request.id in self.begins and position >= self.begins[request.id]:
                found.append(offset + position)
            else:
                self._extra.append(request.carried[self.level])
                found.append(len(self.states) + len(self._extra) - 1)
        return found

    def take(self, rows: Sequence[int]) -> Tensor:
        """States [R, D] of `rows`."""
        known = torch.cat((self.states, torch.stack(self._extra))) if self._extra else self.states
        return known.index_select(0, torch.tensor(rows, device=known.device))


class Drafter:
    """The prediction layers of all requests. `ends` [blocks, layers, D] keeps what the layers need to go on behind a
    full block, so that a sequence may find its beginning in the cache; `filled` are the blocks where that holds. A
    request that was not followed from its first step on never is, nor one that found blocks of such requests."""

    def __init__(self, runner: Runner, num_blocks: int, pace: Pace) -> None:
        self.runner, self.layers, self.pace = runner, runner.num_predictions, pace
        self.filled = [False] * num_blocks
        width = runner.model.config.hidden_size
        self.ends = torch.zeros(num_blocks, self.layers, width, device=runner.device, dtype=runner.dtype)

    def follow(self, news: Sequence[News], hidden: Tensor) -> None:
        """Bring all layers up to what the main model knows of the states `hidden` [T, D], and leave drafts with the
        requests."""
        news = [one for one in news if self._is_followed(one)]
        if not news:
            return
        level = _Level(0, hidden)
        for one in news:
            self._resume(one)
            level.add(one.request, one.start, one.row)
        for depth in range(1, self.layers + 1):
            before, level = level, self._run(depth, news, level)
            self._keep(news, before)
            self._draft(depth, news, level)
        for depth in range(self.layers + 1, 1 + max((one.wanted for one in news), default=0)):
            level = self._chain(depth, [one for one in news if one.wanted >= depth], level)
            self._draft(depth, news, level)
        for one in news:
            one.request.predicted = one.last + 1
            for block in self._blocks(one):
                self.filled[block] = True

    def _is_followed(self, one: News) -> bool:
        request = one.request
        if request.follows is None:
            found = request.blocks[: one.start // self.runner.block_size]
            request.follows = all(self.filled[block] for block in found)
        if not request.follows or not self.pace.drafting:
            request.follows, request.drafts, request.carried = False, [], {}
            for block in self._blocks(one):
                self.filled[block] = False
        return request.follows

    def _blocks(self, one: News) -> list[int]:
        """Those that became full."""
        size = self.runner.block_size
        return one.request.blocks[one.start // size : one.last // size]

    def _resume(self, one: News) -> None:
        """A request new here starts at position 1, or behind the blocks it found in the cache."""
        request = one.request
        request.drafts = []
        if not request.predicted:
            request.predicted = max(one.start, 1)
            if one.start:
                request.carried = dict(enumerate(self.ends[request.blocks[one.start // self.runner.block_size - 1]]))

    def _run(self, depth: int, news: Sequence[News], before: _Level) -> _Level:
        """Layer `depth` over known tokens and, where that many drafts are wanted, over those made so far."""
        parts = []
        for one in news:
            request = one.request
            begin, drafts = max(request.predicted, depth), request.drafts if one.wanted >= depth else []
            tokens = [*request.tokens[begin : one.last + 1], *drafts]
            if tokens:
                rows = before.rows(request, range(begin - 1, begin - 1 + len(tokens)))
                parts.append((one, Stretch(tokens, begin, request.blocks), rows))
        return self._predict(depth, parts, before)

    def _chain(self, depth: int, news: Sequence[News], before: _Level) -> _Level:
        """The last layer once more, over the newest draft alone."""
        parts = []
        for one in news:
            place = one.last + depth - 1
            rows = before.rows(one.request, range(place - 1, place))
            parts.append((one, Stretch(one.request.drafts[-1:], place, one.request.blocks), rows))
        return self._predict(self.layers, parts, before)

    def _predict(self, layer: int, parts: list[tuple[News, Stretch, list[int]]], before: _Level) -> _Level:
        parts.sort(key=lambda part: len(part[1].tokens))
        if not parts:
            return _Level(layer, before.states[:0])
        known = before.take([row for _, _, rows in parts for row in rows])
        level = _Level(layer, self.runner.predict(layer - 1, [stretch for _, stretch, _ in parts], known))
        row = 0
        for one, stretch, _ in parts:
            level.add(one.request, stretch.start, row)
            row += len(stretch.tokens)
        return level

    def _draft(self, depth: int, news: Sequence[News], level: _Level) -> None:
        """The likeliest token behind the newest state of every request that wants that many."""
        asking = [one for one in news if one.wanted >= depth]
        if asking:
            places = [level.offsets[one.request.id] + one.last + depth - 1 for one in asking]
            tokens = likeliest_of(self.runner.logits(level.take(places))).tokens.tolist()
            for one, token in zip(asking, tokens, strict=True):
                one.request.drafts.append(token)

    def _keep(self, news: Sequence[News], level: _Level) -> None:
        """Remember the states at the last position of each block that became full, and of each request."""
        size, blocks, rows = self.runner.block_size, [], []
        for one in news:
            for block in range(one.start // size, one.last // size):
                end = (block + 1) * size - 1
                if end >= level.level:
                    blocks.append(one.request.blocks[block])
                    rows += level.rows(one.request, range(end, end + 1))
            if level.level and one.request.id in level.offsets:
                one.request.carried[level.level] = level.states[level.offsets[one.request.id] + one.last]
        if rows:
            self.ends[torch.tensor(blocks, device=self.ends.device), level.level] = level.take(rows)

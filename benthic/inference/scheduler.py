"""What the next call of the model computes: continuous batching over a pool of blocks.

Requests are ranked by arrival and priority. A step takes one token (and its drafts) of every sequence that is decoding,
then pieces of prompts with what is left of the step's tokens. The first prompt gets at most half of that as long as
others want some, the second half of the rest, and so on: a long prompt holds nobody up, and the order still counts.
Where blocks run out, the request of the highest rank is put back and later computed again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

from benthic.config.engine import EngineConfig
from benthic.inference.blocks import BlockPool
from benthic.inference.request import Request, Status

PRIORITY_STEP = 64
"""A request of priority p stands where one of priority 0 would that came 64 p requests later: it is overtaken, but by
no more than those."""


def rank_of(arrival: int, priority: int) -> int:
    """The order of service: unique, smaller first."""
    return ((arrival + PRIORITY_STEP * priority) << 32) + arrival


class Work(NamedTuple):
    """`count` tokens of a request, from its first uncomputed one on, and `drafts` behind the last."""

    request: Request
    count: int
    drafts: tuple[int, ...] = ()


class Scheduler:
    """Requests that wait and requests that run, each in the order of rank."""

    def __init__(self, config: EngineConfig, pool: BlockPool, draft_tokens: int = 0) -> None:
        self.config, self.pool = config, pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.draft_tokens = draft_tokens
        self.step_tokens = config.max_step_tokens
        self._most_running = max(1, min(config.max_sequences, config.max_step_tokens // (1 + draft_tokens)))

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        request.status = Status.WAITING
        insort(self.waiting, request, key=_rank)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it stands, and give its blocks back."""
        if request.status is not Status.FINISHED:
            (self.waiting if request.status is Status.WAITING else self.running).remove(request)
            request.status = Status.FINISHED
            self._release(request)

    def put_back(self, request: Request) -> None:
        """Let a running request wait again, without its rows: they will be computed anew."""
        self.preemptions += 1
        self.running.remove(request)
        self._release(request)
        self.add(request)

    def schedule(self) -> list[Work]:
        """The next step's work, by number of tokens, the fewest first; empty when there is nothing to do."""
        works: dict[int, Work] = {}
        left = self.step_tokens
        for request in [request for request in self.running if request.is_decoding]:
            drafts = tuple(request.drafts[: left - 1])
            if not left:
                break
            if request.status is Status.RUNNING and self._grow(request, len(request.tokens) + len(drafts), works):
                works[request.id] = Work(request, 1, drafts)
                left -= 1 + len(drafts)
        self._admit()
        self._share_out([request for request in self.running if not request.is_decoding], left, works)
        return sorted(works.values(), key=lambda work: (work.count + len(work.drafts), work.request.rank))

    def schedule_ahead(self, works: list[Work]) -> list[Work] | None:
        """The step behind `works`, whose tokens are not known yet: one more token of each request that these do not end
        for certain. None where it takes more than that: prompts, drafts, requests to admit, blocks to find."""
        works = [work for work in works if work.request.status is Status.RUNNING]
        everyone = len(works) == len(self.running)
        if not everyone or any(work.drafts or work.count != work.request.remaining for work in works):
            return None
        going = [work.request for work in works if work.request.tokens_left > 1]
        wanted = {request.id: self._blocks_for(len(request.tokens) + 1) - len(request.blocks) for request in going}
        missing = sum(count for count in wanted.values() if count > 0)
        if not going or missing > self.pool.available or next(self._startable(), None) is not None:
            return None
        for request in going:
            request.blocks += [self.pool.take() for _ in range(wanted[request.id])]
        return [Work(request, 1) for request in sorted(going, key=_rank)]

    def take_smaller_steps(self) -> bool:
        """Halve the tokens of a step, for a device that had no memory for more; False when it is one already."""
        self.step_tokens, before = max(1, self.step_tokens // 2), self.step_tokens
        return before > 1

    def computed(self, request: Request, tokens: int) -> None:
        """Note that rows of `tokens` more are in place, and let full blocks be found."""
        size = self.config.block_size
        before, request.computed = request.computed, request.computed + tokens
        if self.config.prefix_caching:
            for block in range(before // size, request.computed // size):
                known = self.pool.publish(request.blocks[block], request.prefix(block, size), request.owner)
                request.adopt(block, known)

    def check(self) -> None:
        """Raise AssertionError unless blocks and requests agree: nothing lost, nothing held twice."""
        self.pool.check([request.blocks for request in self.running])
        assert all(request.status is Status.RUNNING for request in self.running), "a running request says it is not"
        for request in self.waiting:
            assert request.status is Status.WAITING, "a waiting request says it is not"
            assert not request.blocks, "a waiting request holds blocks"
            assert not request.computed, "a waiting request says that it has rows"
        for request in self.running:
            assert request.computed <= len(request.blocks) * self.config.block_size, "rows without a block"
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_rank), "a queue is out of order"

    def _share_out(self, requests: list[Request], left: int, works: dict[int, Work]) -> None:
        """Deal `left` tokens out to prompts: halves first, then what nobody else wanted in the order of rank."""
        grants = {}
        for request in requests:
            grants[request.id] = min(request.remaining, max(1, left // 2) if left else 0)
            left -= grants[request.id]
        for request in requests:
            if request.status is Status.RUNNING:
                count = min(request.remaining, grants[request.id] + left)
                left -= count - grants[request.id]
                if count and self._grow(request, request.computed + count, works):
                    works[request.id] = Work(request, count)

    def _admit(self) -> None:
        for request, shared in self._startable():
            self._start(request, shared)

    def _startable(self) -> Iterator[tuple[Request, list[int]]]:
        """Requests that can start now, one after another, each with the known blocks of its beginning."""
        if not self.waiting:
            return
        promised = sum(self._missing(request) for request in self.running)
        for request in list(self.waiting):
            if len(self.running) >= self._most_running:
                return
            if request.leader is not None and not _prompt_is_ready(request.leader):
                continue
            shared = self._known_prefix(request)
            needed = self._blocks_for(len(request.tokens) + self.draft_tokens) - len(shared)
            revived = sum(self.pool.is_cached(block) for block in shared)
            if needed + revived + promised > self.pool.available:
                return
            promised += needed
            yield request, shared

    def _start(self, request: Request, shared: list[int]) -> None:
        for block in shared:
            self.pool.share(block)
        request.blocks = shared
        request.computed = len(shared) * self.config.block_size
        if len(request.tokens) == request.prompt_length:
            request.completion.cached_tokens = request.computed
        request.status = Status.RUNNING
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)

    def _known_prefix(self, request: Request) -> list[int]:
        """Blocks that others filled with this request's first tokens; never its last one, whose logits are wanted."""
        found: list[int] = []
        if self.config.prefix_caching and request.may_share:
            size = self.config.block_size
            for place in range((len(request.tokens) - 1) // size):
                block = self.pool.find(request.prefix(place, size))
                if block is None:
                    break
                request.adopt(place, self.pool.prefix_of(block))
                found.append(block)
        return found

    def _grow(self, request: Request, tokens: int, works: dict[int, Work]) -> bool:
        """Give a running request blocks for `tokens`, taking them from those of higher rank if need be; False when it
        had to be put back itself. Prediction layers write ahead of the main ones."""
        while (missing := self._blocks_for(tokens + self.draft_tokens) - len(request.blocks)) > 0:
            if missing <= self.pool.available:
                request.blocks += [self.pool.take() for _ in range(missing)]
                break
            victim = self.running[-1]
            works.pop(victim.id, None)
            self.put_back(victim)
            if victim is request:
                return False
        return True

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.put_back()

    def _missing(self, request: Request) -> int:
        return max(0, self._blocks_for(len(request.tokens) + self.draft_tokens) - len(request.blocks))

    def fits(self, tokens: int) -> bool:
        """Whether a request that grows to `tokens` can run at all, were it alone."""
        return self._blocks_for(tokens + self.draft_tokens) <= self.pool.size

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)


def _rank(request: Request) -> int:
    return request.rank


def _prompt_is_ready(request: Request) -> bool:
    return request.status is Status.FINISHED or request.computed >= request.prompt_length

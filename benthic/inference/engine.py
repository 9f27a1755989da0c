"""Engine: many requests at once over one model, by continuous batching on a paged cache.

A step schedules work, runs the model over it, draws tokens, and tells what they add to each answer. Between two steps
requests may come and be cancelled. An engine belongs to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benthic.config.engine import EngineConfig
from benthic.errors import CapacityError, ConfigError, RequestError
from benthic.inference.admission import Admission, Prompt, Wish
from benthic.inference.answer import Answer
from benthic.inference.blocks import BlockPool
from benthic.inference.completion import Completion, Event
from benthic.inference.drawing import Drawn, draw_works
from benthic.inference.expert_load import ExpertLoad
from benthic.inference.pace import Pace
from benthic.inference.pretrained import load_model
from benthic.inference.records import keep_prompt_logprobs, keep_routes
from benthic.inference.request import Request, Status
from benthic.inference.runner import Computed, Runner
from benthic.inference.scheduler import Scheduler, Work
from benthic.inference.sizing import num_blocks
from benthic.inference.speculation import Drafter, News
from benthic.inference.statistics import Statistics
from benthic.log import logger
from benthic.model import LanguageModel
from benthic.model.sampling import SamplingParams
from benthic.text import Tokenizer
from benthic.text.tokenizer import TOKENIZER_FILE


class Engine:
    """Text from the model of a published folder, or from a model in memory with its tokenizer.

    `speculative` drafts tokens with the model's prediction layers; a model without them decodes plainly, and the log
    says so. Answers are the same either way.
    """

    def __init__(
        self,
        model: str | Path | LanguageModel,
        device: str | torch.device = "cpu",
        speculative: bool = False,
        *,
        dtype: torch.dtype | None = None,
        settings: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not isinstance(model, LanguageModel):
            folder = Path(model)
            if tokenizer is None and (folder / TOKENIZER_FILE).is_file():
                tokenizer = Tokenizer.from_folder(folder)
            model = load_model(folder, device, dtype)
        elif model.head_weight.is_meta:
            raise ConfigError(
                "the model is on device 'meta', which holds no weights", hint="load it on 'cpu' or 'cuda'"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.settings = settings or EngineConfig()
        self._draft_tokens = self._choose_draft_tokens(speculative)
        weight, drafts = model.head_weight, self._draft_tokens
        blocks = num_blocks(model.config, self.settings, weight.device, weight.dtype, bool(drafts))
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.settings, self.pool, drafts)
        self.runner = Runner(model, self.settings, blocks, bool(drafts))
        self._pace = Pace(judges=not self.settings.always_draft)
        self._drafter = Drafter(self.runner, blocks, self._pace) if drafts else None
        self.expert_load = ExpertLoad(model.config, weight.device)
        self._admission = Admission(model, tokenizer, self.scheduler, self.settings)
        self._answers: dict[int, tuple[Request, Answer]] = {}
        self._statistics = Statistics(blocks=blocks)
        logger.info(
            "engine: cache of %d blocks of %d tokens, at most %d tokens a step, %d drafts",
            blocks,
            self.settings.block_size,
            self.settings.max_step_tokens,
            drafts,
        )

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._answers)

    @property
    def statistics(self) -> Statistics:
        """What the engine did so far, and what it is busy with."""
        return replace(
            self._statistics,
            preemptions=self.scheduler.preemptions,
            finished=self._statistics.finished.copy(),
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            free_blocks=self.pool.available,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Completion]:
        """Answers to `prompts` (text or token ids) in their order, params.n for each.

        `params` are for all or one for each. `on_event` sees what every step adds. Raises RequestError before anything
        runs when one of the prompts cannot be served.
        """
        if not isinstance(prompts, list | tuple):
            raise RequestError(
                f"prompts must be a list, not {type(prompts).__name__}", hint="one prompt is a list of one: [prompt]"
            )
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(each)} sampling parameters")
        wishes = [self._admission.check(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        mine: list[Completion] = []
        unfinished: set[int] = set()
        try:
            for wish in wishes:
                requests = self._add(wish)
                mine += [request.completion for request in requests]
                unfinished |= {request.id for request in requests}
            while unfinished:
                for event in self.step():
                    if event.completion.finish_reason is not None:
                        unfinished.discard(event.request_id)
                    if on_event is not None:
                        on_event(event)
                # What on_event cancelled has no event any more.
                unfinished &= self._answers.keys()
        finally:
            # Nobody waits for what an error or an interrupt left behind.
            for request_id in unfinished:
                self.cancel(request_id)
        return mine

    def add_request(self, prompt: Prompt, params: SamplingParams, *, priority: int = 0, salt: str = "") -> list[int]:
        """The ids of the params.n answers that will come for one prompt.

        A smaller `priority` is served earlier. Only prompts of equal `salt` share cached blocks, so that who may not
        see another's prompts cannot tell from the time to the first token that somebody sent them. Raises RequestError
        for what can never be served and CapacityError when too many wait.
        """
        if type(priority) is not int or not isinstance(salt, str):
            raise RequestError(f"a priority is a whole number and a salt is text, not {priority!r} and {salt!r}")
        most = self.settings.max_waiting
        if most is not None and len(self.scheduler.waiting) + params.n > most:
            raise CapacityError(
                f"{len(self.scheduler.waiting)} requests wait already; max_waiting is {most}", hint="try again later"
            )
        return [request.id for request in self._add(self._admission.check(prompt, params), priority, salt)]

    def cancel(self, request_id: int) -> Completion | None:
        """End a request now and free its blocks; what it has so far, or None when it is not there any more."""
        if request_id not in self._answers:
            return None
        request, answer = self._answers.pop(request_id)
        self.scheduler.finish(request)
        answer.end("cancelled")
        self._statistics.add(request.completion)
        return request.completion

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One call of the model, and what it added to each answer; nothing when there is no work."""
        begun = time.perf_counter()
        if self._drafter is not None:
            self._pace.prepare(self.scheduler.running)
        works = self.scheduler.schedule()
        if not works:
            assert not self._answers, "requests are there, but none can run"
            return []
        try:
            computed = self.runner.compute(works)
            drawn = self._draw(works, computed)
        except torch.OutOfMemoryError as error:
            self._make_room(error)
            return []
        self._statistics.steps += 1
        self.expert_load.add(computed.routing, computed.rows[-1].stop)
        events, news = [], []
        for work, rows, tokens in zip(works, computed.rows, drawn, strict=True):
            request, start = work.request, work.request.computed
            try:
                event = self._settle(work, rows, tokens, computed)
            except Exception as error:
                event = self._fail(request, error)
            if event is not None:
                events.append(event)
            if self._drafter is not None and self._is_followed(request, start):
                wanted = min(self._draft_tokens, request.tokens_left - 1) if tokens and not request.has_ended else 0
                news.append(News(request, start, request.computed - start, rows.start, wanted))
        try:
            if self._drafter is not None:
                main = time.perf_counter() - begun
                told = {event.request_id for event in events}
                failed = self._follow(self._drafter, news, computed)
                events += [event for event in failed if event.request_id not in told]
                tokens = sum(len(event.token_ids) for event in events)
                self._pace.note(works, tokens, main, time.perf_counter() - begun)
        finally:
            for work in works:
                if work.request.has_ended:
                    self.scheduler.finish(work.request)
        return events

    def fail_running(self, error: Exception) -> list[Event]:
        """End all that runs, after a step raised `error` and nothing says whose fault it was; those who wait go on."""
        return [self._fail(request, error) for request in list(self.scheduler.running)]

    def forget_prefixes(self) -> None:
        """Let no new request find blocks of before: the model's weights changed."""
        self.pool.forget()

    def check(self) -> None:
        """Raise AssertionError unless every block is accounted for."""
        self.scheduler.check()
        queued = {request.id for request in (*self.scheduler.waiting, *self.scheduler.running)}
        assert queued == set(self._answers), "a request is lost"

    def _is_followed(self, request: Request, start: int) -> bool:
        """Whether the prediction layers go along with what a step computed from `start` on: of an answer that ended
        only where it fills a block, which others may find."""
        size = self.settings.block_size
        return request.status is Status.RUNNING and (not request.has_ended or request.computed // size > start // size)

    def _follow(self, drafter: Drafter, news: list[News], computed: Computed) -> list[Event]:
        """Let the prediction layers see the step too. Returns the ends of answers that a fault in them cost."""
        try:
            drafter.follow(news, computed.hidden)
        except BaseException as error:
            # Rows of layers that stopped half-way cannot be relied on; what was drawn stays.
            self.forget_prefixes()
            going_on = [one for one in news if not one.request.has_ended]
            for one in going_on:
                self.scheduler.put_back(one.request)
            if isinstance(error, torch.OutOfMemoryError):
                self._make_room(error)
            elif isinstance(error, Exception) and not isinstance(error, torch.AcceleratorError):
                return [self._fail(one.request, error) for one in going_on]
            else:
                raise
        return []

    def _make_room(self, error: torch.OutOfMemoryError) -> None:
        """What the step did not keep is left to smaller ones."""
        if not self.scheduler.take_smaller_steps():
            raise CapacityError(
                f"{self.runner.device} has no memory for a step of one token: {str(error).splitlines()[0]}",
                hint="give the engine a smaller memory_share or num_blocks",
            ) from None
        logger.warning("engine: out of memory; a step has at most %d tokens from now on", self.scheduler.step_tokens)
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _choose_draft_tokens(self, speculative: bool) -> int:
        """How many tokens are drafted a step: 0 where drafts are not wanted, or the model cannot make any."""
        layers = self.model.config.num_nextn_predict_layers
        if speculative and not layers:
            logger.info("engine: the model has no prediction layers; it decodes plainly, without drafts")
        return (self.settings.draft_tokens or layers) if speculative and layers else 0

    def _draw(self, works: list[Work], computed: Computed) -> list[list[Drawn]]:
        """What the step's states say comes next."""
        return draw_works(self.runner, works, computed)

    def _settle(self, work: Work, rows: slice, drawn: list[Drawn], computed: Computed) -> Event | None:
        """Keep what the step found for one request."""
        request, count, drafts = work
        answer = self._answers[request.id][1]
        if request.params.prompt_logprobs is not None:
            keep_prompt_logprobs(request, computed.hidden[rows.start : rows.start + count], self.runner)
        before, right = len(request.completion.token_ids), 0
        for place, one in enumerate(drawn):
            answer.take(one)
            if one.token is not None:
                request.tokens.append(one.token)
            if request.has_ended:
                break
            # A draft is right where plain decoding draws it too: then the logits behind it count.
            if place == len(drafts) or one.token != drafts[place]:
                break
            right += 1
        request.completion.drafted_tokens += len(drafts)
        request.completion.accepted_tokens += right
        if request.params.routed_experts:
            keep_routes(request, computed.routing, slice(rows.start, rows.start + count + right))
        if request.completion.finish_reason == "error":
            self.scheduler.finish(request)  # its rows may be no numbers: nobody shall find them
        else:
            # Rows of an answer that ends are found by others too: its blocks stay until the step is over.
            self.scheduler.computed(request, count + right)
        if request.has_ended:
            del self._answers[request.id]
            self._statistics.add(request.completion)
        elif not drawn:
            return None
        return Event(request.id, tuple(request.completion.token_ids[before:]), answer.news(), request.completion)

    def _fail(self, request: Request, error: Exception) -> Event:
        """End a request whose answer cannot be computed or written, by a fault in a model, a tokenizer or a form."""
        logger.error("engine: request %d failed", request.id, exc_info=error)
        completion = request.completion
        completion.finish_reason, completion.error = "error", f"{type(error).__name__}: {error}"
        self.scheduler.finish(request)
        del self._answers[request.id]
        self._statistics.add(completion)
        return Event(request.id, (), "", completion)

    def _add(self, wish: Wish, priority: int = 0, salt: str = "") -> list[Request]:
        requests = self._admission.requests(wish, priority, salt)
        for request in requests:
            self._answers[request.id] = (request, Answer(request, self.tokenizer))
            self.scheduler.add(request)
        return requests

"""What an engine takes in: prompts checked before anything runs, and requests made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benthic.config.engine import EngineConfig
from benthic.errors import RequestError
from benthic.inference.form import Form, Forms
from benthic.inference.generate import check_prompt, end_ids
from benthic.inference.prefix import salted
from benthic.inference.request import Request
from benthic.inference.scheduler import Scheduler, rank_of
from benthic.model import LanguageModel
from benthic.model.sampling import Sampler, SamplingParams
from benthic.text import Tokenizer

Prompt = str | Sequence[int]


class Wish(NamedTuple):
    """A prompt that can be served: its ids, what is asked for, and the form its answers are bound to."""

    prompt: list[int]
    params: SamplingParams
    form: Form | None


class Admission:
    """Numbers requests in the order in which they come."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None, scheduler: Scheduler, settings: EngineConfig
    ) -> None:
        self._config, self._tokenizer, self._scheduler = model.config, tokenizer, scheduler
        self._shares = settings.prefix_caching
        self._ends = frozenset(end_ids(model))
        self._forms = None if tokenizer is None else Forms(tokenizer, model.config.vocab_size, self._ends)
        self._arrivals = 0

    def check(self, prompt: Prompt, params: SamplingParams) -> Wish:
        """A wish that can be fulfilled, or RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"what is asked for must be SamplingParams, not {type(params).__name__}")
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("the prompt is text, but this model has no tokenizer", hint="send token ids")
            prompt = self._tokenizer.encode(prompt, add_bos=self._tokenizer.add_bos_token)
        check_prompt(prompt, params, self._config.vocab_size, self._config.max_position_embeddings)
        if (params.stop or params.forms) and self._forms is None:
            raise RequestError("stop strings and forms need text, but this model has no tokenizer")
        if not self._scheduler.fits(len(prompt) + params.max_tokens):
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} do not fit the cache of "
                f"{self._scheduler.pool.size} blocks of {self._scheduler.config.block_size} tokens",
                hint="ask for fewer tokens, or give the engine more num_blocks",
            )
        return Wish(list(prompt), params, None if self._forms is None else self._forms.make(params))

    def requests(self, wish: Wish, priority: int, salt: str, owner: str) -> list[Request]:
        """One request for each of the answers; those behind the first wait for its prompt, and share it."""
        prompt, params, form = wish
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._ends)
        made: list[Request] = []
        for index in range(params.n):
            leader = made[0] if made and self._shares else None
            sampler, rank = Sampler(params, prompt, ends, index), rank_of(self._arrivals, priority)
            request = Request(self._arrivals, prompt, sampler, rank, salted(salt), index, leader)
            request.owner = owner
            request.form = None if form is None else form.copy()
            self._arrivals += 1
            made.append(request)
        return made

"""How the next token is drawn from logits.

A draw is a function of the logits, the seed and the token's place in its answer: the random number of place i is a hash
of (seed, i), and picks where the cumulated probabilities pass it. So an answer does not depend on what else is in a
batch, on where it was interrupted, or on how many of its places were drawn at once.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from benthic.config.settings import Settings

_BITS = 48
"""Of a random number in [0, 1): enough for any vocabulary, and its product with a float64 sum stays below the sum."""
_TINY = torch.finfo(torch.float32).tiny


class SamplingParams(Settings):
    """What one request asks for. Names and meanings are those of the OpenAI and vLLM interfaces.

    `temperature` 0 takes the likeliest token. `min_p` keeps tokens of at least that share of the likeliest one's
    probability, `top_k` the k likeliest (0: all), then `top_p` the fewest whose probabilities reach p. `seed` makes the
    draws repeatable. `stop` strings end the text before them and `stop_token_ids` end it as the model's own
    end-of-sequence tokens do, which `ignore_eos` leaves aside; neither counts, nor can such a token be drawn, before
    `min_tokens`. Penalties and `logit_bias` are added to logits before all else; `repetition_penalty` counts the
    prompt too, as in the CTRL paper (arXiv:1909.05858). `n` answers are drawn, each with a seed of its own.

    `logprobs` and `prompt_logprobs` ask for that many of the likeliest alternatives beside each token (0: the token
    alone); they are those of the model, before temperature. One of `json_schema`, `regex` and `grammar` (Lark) binds
    the text to a form.
    """

    model_config = ConfigDict(strict=True)  # "1" and True are no numbers

    max_tokens: int = Field(128, ge=1)
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field((), max_length=64, strict=False)
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((), strict=False)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    routed_experts: bool = False
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return json.dumps(value) if isinstance(value, dict | bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it can be at most max_tokens ({self.max_tokens})")
        if len(self.forms) > 1:
            raise ValueError(f"{' and '.join(self.forms)} are both given; a text is bound to one form")
        return self

    @property
    def forms(self) -> dict[str, str]:
        """What binds the text to a form, by its kind: at most one."""
        kinds = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return {kind: text for kind, text in kinds.items() if text is not None}

    @property
    def changes_logits(self) -> bool:
        """Whether logits are not what the model says."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias or self.min_tokens)


class Sampler:
    """Draws for one request, and remembers what it drew.

    `ends` are the tokens that end the answer, and `index` the number of this answer among `n`.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), ends: AbstractSet[int] = frozenset(), index: int = 0
    ) -> None:
        self.params, self.prompt, self.ends = params, prompt, ends
        self.drawn: list[int] = []
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._index = index

    def draw(self, logits: Tensor) -> int:
        """A token id by `logits` [V], which joins what was drawn."""
        if self.params.changes_logits:
            logits = self.changed(logits)
        if self.params.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = distributions(logits[None], [self.params])
            token = int(pick(probabilities, [self.uniform(len(self.drawn))]))
        self.drawn.append(token)
        return token

    def uniform(self, place: int) -> float:
        """The random number in [0, 1) of the answer's token number `place`."""
        key = b"".join(number.to_bytes(8, "little") for number in (self._seed, self._index, place))
        return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> (64 - _BITS)) / 2**_BITS

    def changed(self, logits: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """Logits float32 [V] after penalties, bias and min_tokens; `drafts` are taken as drawn."""
        params, logits = self.params, logits.float().clone()
        drawn = torch.tensor([*self.drawn, *drafts], dtype=torch.int64, device=logits.device)
        if params.repetition_penalty != 1:
            seen = torch.cat((drawn, torch.tensor(self.prompt, dtype=torch.int64, device=logits.device))).unique()
            before = logits[seen]
            factor = params.repetition_penalty
            logits[seen] = torch.where(before > 0, before / factor, before * factor)
        if len(drawn) and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = drawn.unique(return_counts=True)
            logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            places = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[places] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if len(drawn) < params.min_tokens and self.ends:
            logits[torch.tensor(sorted(self.ends), device=logits.device)] = -torch.inf
        return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """`distributions` of one request: [V] to [V]."""
    return distributions(logits[None], [params])[0]


def distributions(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities float32 [B, V] after each request's temperature, min_p, top_k and top_p; the likeliest token always
    keeps some."""
    scaled = logits.float() - logits.amax(-1, keepdim=True)
    temperature = _column([one.temperature for one in params], logits)
    # A divisor that float32 rounds to nothing, or to a subnormal that a device flushes, would make 0 / 0 of the best.
    scaled = torch.where(
        temperature >= _TINY, scaled / temperature.clamp(min=_TINY), torch.where(scaled < 0, -torch.inf, scaled)
    )
    if any(one.min_p for one in params):
        scaled = scaled.masked_fill(scaled < _column([one.min_p for one in params], logits).log(), -torch.inf)
    if not any(one.top_k or one.top_p < 1 for one in params):
        return scaled.softmax(-1)
    ordered, places = scaled.sort(dim=-1, descending=True, stable=True)
    size = logits.shape[-1]
    kept = _column([one.top_k or size for one in params], logits)
    probabilities = ordered.masked_fill_(torch.arange(size, device=logits.device) >= kept, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    bound = _column([one.top_p if one.top_p < 1 else torch.inf for one in params], logits)
    probabilities = probabilities.masked_fill_(before >= bound, 0)
    probabilities[:, 0].clamp_(min=_TINY)
    probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, places, probabilities)


def pick(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Token ids int64 [B]: where the cumulated `probabilities` [B, V] pass each of `uniforms`."""
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    target = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


def _column(values: Sequence[float | int], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

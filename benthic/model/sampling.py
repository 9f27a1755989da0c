"""How the next token is drawn from logits. The same numbers on every device: the draw happens on the processor."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from benthic.config.settings import Settings


class SamplingParams(Settings):
    """What one request asks for. Names and meanings are those of the OpenAI and vLLM interfaces.

    `temperature` 0 takes the likeliest token. `top_k` keeps the k likeliest (0: all), then `top_p` the fewest whose
    probabilities reach p. `seed` makes the draws repeatable. `stop` strings end the text before them and
    `stop_token_ids` end it as the model's own end-of-sequence tokens do.
    """

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()


class Sampler:
    """Draws for one request, with a random stream of its own."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._stream = torch.Generator()
        if params.seed is None:
            self._stream.seed()
        else:
            self._stream.manual_seed(params.seed)

    def draw(self, logits: Tensor) -> int:
        """A token id by `logits` [V]."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = distribution(logits.cpu(), self.params)
        return int(torch.multinomial(probabilities, 1, generator=self._stream))


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32 [V] after temperature, top_k and top_p; the likeliest token always keeps some."""
    scaled = logits.float() - logits.max()
    # A divisor that float32 rounds to nothing, or to a subnormal that a device flushes, would make 0 / 0 of the best.
    if params.temperature >= torch.finfo(torch.float32).tiny:
        scaled = scaled / params.temperature
    else:
        scaled = scaled.masked_fill(scaled < 0, -torch.inf)
    ordered, places = scaled.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= params.top_p] = 0
        probabilities[0].clamp_(min=torch.finfo(torch.float32).tiny)
        probabilities /= probabilities.sum()
    return torch.zeros_like(probabilities).scatter_(0, places, probabilities)

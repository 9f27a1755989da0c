"""One token after another over a cache: what generation and a run's samples share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import torch

from benthic.model.cache import Cache
from benthic.model.language_model import LanguageModel
from benthic.model.sampling import Sampler, SamplingParams


@torch.inference_mode()
def decode(
    model: LanguageModel,
    prompt: Sequence[int],
    params: SamplingParams,
    ends: Set[int],
    dtype: torch.dtype | None = None,
    agreed: Callable[[int], int] = int,
) -> Iterator[int]:
    """Token ids that continue `prompt`, as they are drawn: at most params.max_tokens, and none from the first of `ends`
    on. `dtype` is what a model computes in whose weights are kept in another. `agreed` makes of each token drawn the
    one that is taken: where several processes compute one model, the same on all. Raises RequestError where prompt and
    tokens exceed the model's positions."""
    weight = model.head_weight
    cache = Cache(model.config, 1, len(prompt) + params.max_tokens, weight.device, dtype or weight.dtype)
    sampler, step = Sampler(params, list(prompt), ends), list(prompt)
    for _ in range(params.max_tokens):
        states = model.states(torch.tensor([step], device=weight.device), cache=cache)
        # The head at the last position alone: a long prompt's logits can be larger than the model.
        token = agreed(sampler.draw(model.logits(states.hidden[0, -1])))
        if token in ends:
            return
        yield token
        step = [token]

"""Completions during a run: the model's own words."""

from __future__ import annotations

import torch

from benthic.model.decoding import decode
from benthic.model.language_model import LanguageModel
from benthic.model.sampling import SamplingParams
from benthic.parallel.world import ALONE, World
from benthic.text.tokenizer import Tokenizer


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float,
    dtype: torch.dtype | None = None,
    world: World = ALONE,
) -> str:
    """What follows `prompt`: at most `max_tokens` tokens, fewer at the end of text or of the model's positions.

    Temperature 0 takes the likeliest token; otherwise the draws are the same every time, whatever else is random.
    `dtype` as for `decode`. A model that is spread over the ranks of `world` is asked the same on all of them,
    and rank 0's tokens are taken: where last bits differ, another rank could end sooner, and all would wait.
    """
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token)
    room = model.config.max_position_embeddings - len(ids)
    if not ids or room < 1:
        return ""
    params = SamplingParams(max_tokens=min(max_tokens, room), temperature=temperature, seed=0)
    ends = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    return tokenizer.decode(list(decode(model, ids, params, ends, dtype, world.leaders)))

"""Completions during a run: the model's own words, one token after another over its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.model.cache import Cache
from benthic.model.language_model import LanguageModel
from benthic.text.tokenizer import Tokenizer


@torch.no_grad()
def complete(model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_tokens: int, temperature: float) -> str:
    """What follows `prompt`: at most `max_tokens` tokens, fewer at the end of text or of the model's positions.

    Temperature 0 takes the likeliest token; otherwise the draws are the same every time, whatever else is random.
    """
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token)
    device, dtype = model.head_weight.device, model.head_weight.dtype
    limit = min(len(ids) + max_tokens, model.config.max_position_embeddings)
    if not ids or len(ids) >= limit:
        return ""
    cache = Cache(model.config, 1, limit, device, dtype)
    stream = torch.Generator().manual_seed(0)
    chosen: list[int] = []
    given = torch.tensor([ids], device=device)
    while len(ids) + len(chosen) < limit:
        hidden = model.states(given, cache=cache).hidden[:, -1]
        token = _choose((hidden @ model.head_weight.T).float().cpu()[0], temperature, stream)
        if token == tokenizer.eos_id:
            break
        chosen.append(token)
        given = torch.tensor([[token]], device=device)
    return tokenizer.decode(chosen)


def _choose(logits: Tensor, temperature: float, stream: torch.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=stream))

"""The reference way to generate: one prompt, one token at a time, over a cache. What an engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benthic.errors import RequestError
from benthic.model import LanguageModel
from benthic.model.decoding import decode
from benthic.model.sampling import SamplingParams
from benthic.text import Detokenizer, Tokenizer


def generate(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Token ids that continue `prompt`, as they are drawn; at most params.max_tokens.

    Ends before an end-of-sequence token of the model's config or one of params.stop_token_ids. Raises RequestError
    for an empty prompt, ids outside the vocabulary, and a length beyond the model's positions.
    """
    _check(model, prompt, params)
    return decode(model, list(prompt), params, end_ids(model) | set(params.stop_token_ids))


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> Iterator[str]:
    """Text that continues `prompt`, in pieces of whole characters; ends before any of params.stop."""
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token)
    return _until_stop(_pieces(generate(model, ids, params), tokenizer), params.stop)


def end_ids(model: LanguageModel) -> set[int]:
    """End-of-sequence tokens of the model's config."""
    stated = model.config.eos_token_id
    return set() if stated is None else {stated} if isinstance(stated, int) else set(stated)


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        yield detokenizer.add([token])
    yield detokenizer.finish()


def _until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """`pieces` up to the first stop string. What could be the start of one is held back until it is not."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            held = held[: min(found)]
            break
        safe = len(held) - _held_back(held, stops)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that starts a stop string."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def _check(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> None:
    if not prompt:
        raise RequestError("the prompt has no tokens", hint="give at least one character of text")
    wrong = next((token for token in prompt if not 0 <= token < model.config.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"the prompt holds token {wrong}; the model's vocabulary is 0 to {model.config.vocab_size - 1}",
            hint="is this the model's own tokenizer?",
        )
    limit = model.config.max_position_embeddings
    if len(prompt) + params.max_tokens > limit:
        room = limit - len(prompt)
        raise RequestError(
            f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed the model's {limit} positions",
            hint=f"set max_tokens to at most {room}" if room > 0 else "shorten the prompt",
        )

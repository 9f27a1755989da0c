"""The reference way to generate: one prompt, one token at a time, over a cache. What an engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benthic.errors import RequestError
from benthic.inference.stop import StopText
from benthic.model import LanguageModel
from benthic.model.decoding import decode
from benthic.model.sampling import SamplingParams
from benthic.text import Detokenizer, Tokenizer


def generate(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Token ids that continue `prompt`, as they are drawn; at most params.max_tokens.

    Ends before an end-of-sequence token of the model's config or one of params.stop_token_ids. Raises RequestError
    for an empty prompt, ids outside the vocabulary, and a length beyond the model's positions.
    """
    _refuse_what_needs_an_engine(params)
    check_prompt(prompt, params, model.config.vocab_size, model.config.max_position_embeddings)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else end_ids(model))
    return decode(model, list(prompt), params, ends)


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
    """`pieces` up to the first stop string."""
    stop = StopText(stops)
    for piece in pieces:
        safe = stop.add(piece)
        if safe:
            yield safe
        if stop.found is not None:
            return
    if rest := stop.finish():
        yield rest


def check_prompt(prompt: Sequence[int], params: SamplingParams, vocabulary: int, positions: int) -> None:
    """Raise RequestError for an empty prompt, ids outside the vocabulary, and a length beyond the positions."""
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"a prompt is text or a list of token ids, not {type(prompt).__name__}")
    if not prompt:
        raise RequestError("the prompt has no tokens", hint="give at least one character of text")
    odd = [token for token in prompt if type(token) is not int]
    if odd:
        raise RequestError(f"the prompt holds {odd[0]!r}, a {type(odd[0]).__name__}; token ids are whole numbers")
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RequestError(
            f"the prompt holds token {wrong}; the model's vocabulary is 0 to {vocabulary - 1}",
            hint="is this the model's own tokenizer?",
        )
    for name in ("logit_bias", "stop_token_ids"):
        strange = next((token for token in getattr(params, name) if token >= vocabulary), None)
        if strange is not None:
            raise RequestError(f"{name} names token {strange}; the model's vocabulary is 0 to {vocabulary - 1}")
    if len(prompt) + params.max_tokens > positions:
        room = positions - len(prompt)
        raise RequestError(
            f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed the model's {positions} positions",
            hint=f"set max_tokens to at most {room}" if room > 0 else "shorten the prompt",
        )


def _refuse_what_needs_an_engine(params: SamplingParams) -> None:
    plain = SamplingParams()
    for name in ("n", "logprobs", "prompt_logprobs", "routed_experts", "json_schema", "regex", "grammar"):
        if getattr(params, name) != getattr(plain, name):
            raise RequestError(
                f"plain generation gives one answer and no more; {name} is {getattr(params, name)!r}",
                hint="use benthic.Engine",
            )

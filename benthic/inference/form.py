"""Text bound to a form (JSON schema, regular expression, Lark grammar): which tokens may come next, by llguidance.

A form follows one answer token by token and can look ahead over drafts, so that it binds speculative decoding as it
binds plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benthic.errors import ConfigError, RequestError
from benthic.model.sampling import SamplingParams
from benthic.text import Tokenizer

if TYPE_CHECKING:
    import llguidance
else:
    try:
        import llguidance
    except ImportError:  # an optional dependency: Forms refuses with the command that installs it
        llguidance = None

_JSON = {"whitespace_pattern": r"( |\n {0,32})?"}
"""A space, or a new line with its indentation: a model may not fill its answer with white space between two values."""


class Form:
    """Where one answer stands in its form. Of the model's `vocabulary` the first `spelled` tokens have a text."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, spelled: int) -> None:
        self._matcher, self._vocabulary, self._spelled = matcher, vocabulary, spelled
        self._fault = ""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow any more."""
        return self._matcher.is_stopped()

    def can_begin(self, ends: frozenset[int]) -> bool:
        """Whether any token but one of `ends` may come next."""
        return any(token not in ends for token in self._mask().nonzero().flatten().tolist())

    @property
    def error(self) -> str:
        """Why the form cannot be followed any further; empty as long as it can."""
        return self._fault or self._matcher.get_error().partition("\n")[0]

    def copy(self) -> Form:
        """The same form at the same place, for another answer."""
        return Form(self._matcher.deep_copy(), self._vocabulary, self._spelled)

    def take(self, token: int) -> None:
        """The answer goes on with `token`, one of those allowed."""
        self._matcher.consume_token(token)

    def allowed(self, drafts: Sequence[int] = ()) -> list[Tensor | None]:
        """Which tokens bool [V] may come next, and behind each of `drafts`; None behind one that may not come.

        A fault of the matcher is this form's `error`: it costs no other answer of the step.
        """
        try:
            return self._masks(drafts)
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"
            return [None] * (1 + len(drafts))

    def _masks(self, drafts: Sequence[int]) -> list[Tensor | None]:
        # On a copy: a form that fails behind a draft cannot step back, and the draft may be wrong.
        ahead, masks = (self.copy() if drafts else self), [self._mask()]
        for draft in drafts:
            if ahead.is_complete or not masks[-1][draft]:
                break
            ahead.take(draft)
            masks.append(ahead._mask())
        return [*masks, *[None] * (1 + len(drafts) - len(masks))]

    def _mask(self) -> Tensor:
        mask = torch.zeros(self._vocabulary, dtype=torch.bool)
        if not self.is_complete:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            known = min(len(bits), self._vocabulary, self._spelled)
            mask[:known] = torch.from_numpy(bits[:known].astype(bool))
        return mask


class Forms:
    """The forms of one tokenizer's texts; `vocabulary` is the model's, `ends` the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: frozenset[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends

    def make(self, params: SamplingParams) -> Form | None:
        """The form that `params` ask for, at its beginning. Raises RequestError for one that cannot be."""
        if not params.forms:
            return None
        if llguidance is None:
            raise ConfigError("forms need llguidance, which is not installed", hint="pip install 'benthic[serve]'")
        ((kind, text),) = params.forms.items()
        try:
            matcher = llguidance.LLMatcher(self._vocabulary_tree, _grammar(kind, text), log_level=0)
        except ValueError as error:
            raise RequestError(f"{kind} cannot be used: {error}") from None
        if matcher.is_error():
            raise RequestError(f"{kind} cannot be used: {matcher.get_error()}")
        form = Form(matcher, self.vocabulary, self.tokenizer.vocab_size)
        if not form.can_begin(self.ends):
            raise RequestError(f"{kind} cannot be used: no text but an empty one, or none at all, has this form")
        return form

    @cached_property
    def _vocabulary_tree(self) -> llguidance.LLTokenizer:
        """Built once: seconds for a large vocabulary."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelled(self.tokenizer, self.ends)))


def _grammar(kind: str, text: str) -> str:
    match kind:
        case "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=_JSON)
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
    return llguidance.LLMatcher.grammar_from_lark(text)


class _Spelled:
    """A tokenizer as llguidance reads it: every token's bytes, and an end. Without an end of its own the vocabulary
    gets one more token for it, which no model can draw."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        known = sorted(end for end in ends if end < len(self.tokens))
        if not known:
            self.tokens.append(b"<end>")
        self.eos_token_id = known[0] if known else len(self.tokens) - 1
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.control_ids, *known, self.eos_token_id})

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)

"""Drawn tokens become an answer: text in whole characters, up to what ends it."""

from __future__ import annotations

from benthic.inference.completion import FinishReason
from benthic.inference.drawing import Drawn
from benthic.inference.request import Request
from benthic.inference.stop import StopText
from benthic.text import Detokenizer, Tokenizer


class Answer:
    """Fills one completion; without a tokenizer its text stays empty."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.completion, self._sampler, self._form = request.completion, request.sampler, request.form
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopText(request.params.stop)
        self._shown = 0
        if request.params.logprobs:
            self.completion.top_logprobs = []

    def take(self, drawn: Drawn) -> None:
        """One more token, perhaps the one that ends the answer."""
        completion, params = self.completion, self._sampler.params
        if drawn.token is None:
            completion.error = "no token can be drawn: the model's logits are not finite, or all tokens are forbidden"
            return self.end("error")
        self._sampler.drawn.append(drawn.token)
        if drawn.token in self._sampler.ends:
            return self.end("stop", drawn.token)
        completion.token_ids.append(drawn.token)
        completion.logprobs.append(drawn.logprob)
        if completion.top_logprobs is not None:
            completion.top_logprobs.append(drawn.alternatives or {})
        self._add_text(drawn.token, len(completion.token_ids) < params.min_tokens)
        if self._form is not None:
            self._form.take(drawn.token)
        if self._stop.found is not None:
            self.end("stop", self._stop.found)
        elif self._form is not None and self._form.error:
            completion.error = self._form.error
            self.end("error")
        elif self._form is not None and self._form.is_complete:
            self.end("stop")
        elif len(completion.token_ids) == params.max_tokens:
            self.end("length")

    def end(self, reason: FinishReason, cause: int | str | None = None) -> None:
        """No more tokens come."""
        if self._detokenizer is not None:
            self.completion.text += self._stop.add(self._detokenizer.finish()) + self._stop.finish()
        self.completion.finish_reason, self.completion.stop_reason = reason, cause

    def news(self) -> str:
        """The text since the last call."""
        before, self._shown = self._shown, len(self.completion.text)
        return self.completion.text[before:]

    def _add_text(self, token: int, too_early_to_stop: bool) -> None:
        if self._detokenizer is not None:
            piece = self._detokenizer.add([token])
            self.completion.text += piece if too_early_to_stop else self._stop.add(piece)

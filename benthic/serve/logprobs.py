"""Log-probabilities as OpenAI's clients read them, with the bytes of tokens that are parts of characters."""

from __future__ import annotations

from benthic.serve.messages import Delta, PromptLogprobs
from benthic.serve.wire import ChatLogprobs, Logprobs, TokenLogprob, TopLogprob
from benthic.text import Detokenizer, Tokenizer

LOWEST = -9999.0
"""OpenAI's "very unlikely"; JSON has no infinity."""


def chat_logprobs(delta: Delta, wanted: int, tokenizer: Tokenizer) -> ChatLogprobs:
    """Of a delta's tokens, each with `wanted` alternatives."""
    alternatives = delta.alternatives or [{}] * len(delta.token_ids)
    content = []
    for token, logprob, others in zip(delta.token_ids, delta.logprobs or [], alternatives, strict=True):
        top = [_top(one, value, tokenizer) for one, value in _likeliest(others, wanted)]
        mine = _top(token, logprob, tokenizer)
        content.append(TokenLogprob(mine.token, mine.logprob, mine.bytes, top))
    return ChatLogprobs(content)


def _likeliest(alternatives: dict[int, float], wanted: int) -> list[tuple[int, float]]:
    return sorted(alternatives.items(), key=lambda pair: -pair[1])[:wanted]


def _top(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    # A control token has a spelling, but no bytes of the text.
    shown = tokenizer.decode_bytes([token], skip_special=True)
    return TopLogprob(tokenizer.decode([token]), max(logprob, LOWEST), list(shown))


class TextLogprobs:
    """Of one plain completion, as its tokens come; `wanted` alternatives each."""

    def __init__(self, wanted: int, tokenizer: Tokenizer) -> None:
        self._wanted, self._tokenizer = wanted, tokenizer
        self._detokenizer, self._offset = Detokenizer(tokenizer), 0

    def of_delta(self, delta: Delta) -> Logprobs:
        """Of the next tokens of the answer."""
        return self._of(list(delta.token_ids), list(delta.logprobs or []), list(delta.alternatives or []))

    def of_prompt(self, prompt: list[int], given: PromptLogprobs) -> Logprobs:
        """Of an echoed prompt."""
        return self._of(prompt, given.chosen, given.alternatives)

    def _of(
        self, tokens: list[int], chosen: list[float | None] | list[float], others: list[dict[int, float] | None] | list
    ) -> Logprobs:
        result = Logprobs([], [], [], [])
        for place, (token, logprob) in enumerate(zip(tokens, chosen, strict=True)):
            result.tokens.append(self._spelled(token))
            result.token_logprobs.append(None if logprob is None else max(logprob, LOWEST))
            result.text_offset.append(self._offset)
            result.top_logprobs.append(self._alternatives(token, logprob, others[place] if others else {}))
            self._offset += len(self._detokenizer.add([token]))
        return result

    def _alternatives(self, token: int, logprob: float | None, others: dict[int, float] | None) -> dict | None:
        if logprob is None or others is None:
            return None
        # OpenAI's dictionary has the token that came too, even where others were likelier.
        pairs = dict(_likeliest(others, self._wanted)) | ({token: logprob} if self._wanted else {})
        return {self._spelled(one): max(value, LOWEST) for one, value in pairs.items()}

    def _spelled(self, token: int) -> str:
        """Its text, or as OpenAI writes parts of characters."""
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

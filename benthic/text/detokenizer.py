"""Detokenizer: ids arrive one at a time, text leaves in whole characters.

A token of byte-level BPE may end inside a character; its bytes wait here until the rest arrives. The pieces, joined,
are exactly `tokenizer.decode` of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from benthic.text.tokenizer import Tokenizer


class Detokenizer:
    """The state of one stream: at most three bytes."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete, perhaps empty. U+FFFD stands only for bytes that no continuation can mend."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: empty, or U+FFFD for a character that never came. The stream starts anew."""
        left = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return left

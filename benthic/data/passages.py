"""Long texts in passages that a tokenizer reads one by one: on all cores, in memory that does not grow with the text.

A passage ends at a line's end between two characters that are not white space. Byte-level pre-tokenizers all cut there,
so that the ids are those of the whole text; a text with no such place in `longest` characters is cut where it must be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_LINE_START = re.compile(r"(?<=\S\n)(?=\S)")


def passages(text: str, size: int = 1 << 16, longest: int = 1 << 18) -> Iterator[str]:
    """`text` in parts of about `size` characters; an empty text is one empty part."""
    start = 0
    while len(text) - start > size:
        found = _LINE_START.search(text, start + size, start + longest)
        end = found.start() if found else min(start + longest, len(text))
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]

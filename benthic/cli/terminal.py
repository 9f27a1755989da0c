"""Text that others wrote, made harmless for a terminal."""

from __future__ import annotations

import re
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor, change its colours or name its window."""
    return _CONTROL.sub("", text)


def shown(text: str, stream: TextIO) -> str:
    """`text` as it is, unless `stream` is a terminal."""
    return printable(text) if stream.isatty() else text

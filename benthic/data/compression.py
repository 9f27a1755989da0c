"""What general compressors make of the held-out text, in bits per byte: the yardstick beside a model's loss.

The `alone` numbers come from the held-out text and nothing else. A model has read the training text first; the fair
companion is `xz_after_training_text`: how many bytes longer xz's archive of training text + held-out text is than that
of the training text, with a dictionary that spans both.
"""

from __future__ import annotations

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benthic.errors import DataError

TRAINING_LIMIT = 12 << 20
"""xz reads this much of the training text at most (its end), to stay within seconds."""

# xz -6 with a dictionary that spans all it is given: on ten megabytes of source code the archive of xz -9e is no
# smaller (1.25 bits a byte both), and takes four times as long.
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 16 << 20}]


@dataclass(frozen=True, slots=True)
class Compression:
    """Bits per byte of one held-out text."""

    held_out_bytes: int
    zlib_alone: float
    xz_alone: float
    xz_after_training_text: float | None
    training_bytes: int
    """How much training text xz had read."""


def compress(held_out: bytes, training: bytes | None = None) -> Compression:
    """Measure `held_out`; with `training`, xz after it too (some seconds for ten megabytes)."""
    if not held_out:
        raise DataError("there is no held-out text to compress")
    read = (training or b"")[-TRAINING_LIMIT:]
    with ThreadPoolExecutor(2) as pool:  # both release the interpreter's lock
        sizes = list(pool.map(_xz, [read, read + held_out])) if read else []
    bits = 8 / len(held_out)
    return Compression(
        held_out_bytes=len(held_out),
        zlib_alone=len(zlib.compress(held_out, 9)) * bits,
        xz_alone=_xz(held_out) * bits,
        xz_after_training_text=(sizes[1] - sizes[0]) * bits if sizes else None,
        training_bytes=len(read),
    )


def _xz(content: bytes) -> int:
    return len(lzma.compress(content, filters=_XZ))

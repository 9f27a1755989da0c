"""A shuffled order that needs no memory: the place of sample i is computed, not stored.

A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside (Black and
Rogaway 2002, ciphers with arbitrary finite domains). At most four candidates are tried a sample on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benthic.data.splitmix import key, mix_array

_ROUNDS = 6


def permuted(index: NDArray[np.int64], size: int, *seed: int) -> NDArray[np.int64]:
    """Where each `index` (int64, in [0, size)) goes under the permutation of [0, size) that `seed` names."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(key(*seed, turn)) for turn in range(_ROUNDS)]
    found = index.astype(np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        found[outside] = _feistel(found[outside], half, keys)
        outside = found >= np.uint64(size)
    return found.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for one in keys:
        left, right = right, left ^ (mix_array(right ^ one) & mask)
    return (left << shift) | right

"""Packing: a stream of documents cut into sequences, each with the one token more that its last label needs.

    stream      t0 t1 t2 t3 t4 t5 t6 ...          sequence_length S = 3
    window 0    t0 t1 t2 t3                       inputs t0..t2, labels t1..t3
    window 1             t3 t4 t5 t6              overlaps by one, so that no token is a label twice

For training the stream is a ring that each epoch enters at another place: windows are cut elsewhere, and the few tokens
that do not fill a window are others every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benthic.data.tokens import TokenFile
from benthic.errors import DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences with one token more than is read: inputs are tokens[:, :-1], labels tokens[:, 1:]."""

    tokens: Tensor
    """int64 [B, S + 1]"""
    documents: Tensor
    """int64 [B, S + 1]: the number of the document each token belongs to."""


def count_windows(source: TokenFile, sequence_length: int) -> int:
    """Windows an epoch has. DataError when the split is smaller than one."""
    tokens = source.facts.tokens
    if tokens < sequence_length + 1:
        raise DataError(
            f"{source.path} holds {tokens} tokens, less than one sequence of {sequence_length} and its label "
            f"({sequence_length + 1})",
            hint="use a shorter sequence_length, more text or another validation_fraction",
        )
    return tokens // sequence_length


def cut(source: TokenFile, starts: NDArray[np.int64], length: int) -> Batch:
    """`length` tokens from each of `starts` (int64 [B]), around the ring."""
    places = (starts[:, None] + np.arange(length)) % source.facts.tokens  # [B, length]
    tokens = source.tokens[places].astype(np.int64)
    documents = np.searchsorted(source.offsets, places, side="right") - 1
    return Batch(torch.from_numpy(tokens), torch.from_numpy(documents))

"""What token ids must be before a model sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.errors import RequestError


def check_ids(input_ids: Tensor) -> None:
    """Raise RequestError unless these are int64 [sequences, tokens], at least one of each."""
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise RequestError(
            f"input_ids is {input_ids.dtype} of shape {list(input_ids.shape)}; it must be int64 [sequences, tokens], "
            "neither of them 0"
        )


def check_range(input_ids: Tensor, vocabulary: int) -> None:
    """Raise RequestError for an id outside the vocabulary: it stops a GPU for good, so it never gets there."""
    check_ids(input_ids)
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise RequestError(
            f"input_ids holds {wrong}; the vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}",
            hint="is this the model's own tokenizer?",
        )

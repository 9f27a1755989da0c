"""The likeliest token of each row of logits, and its log-probability."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


def likeliest(
    logits: Float[Tensor, "rows vocabulary"],
) -> tuple[Int64[Tensor, " rows"], Float64[Tensor, "3 rows"]]:
    """Tokens, of equals the first; and in float64, which holds each exactly, tokens, float32 log-probabilities, ones.

    A NaN or an infinity among a row's logits leaves a log-probability that is not finite, and the token is any.
    """
    tokens = logits.argmax(-1)
    logprobs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens[:, None])[:, 0]
    return tokens, torch.stack((tokens.double(), logprobs.double(), torch.ones_like(logprobs, dtype=torch.float64)))

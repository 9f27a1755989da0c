"""The likeliest token of each row of logits. Reference: numerics/reference/likeliest.py. No gradients."""

from __future__ import annotations

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from benthic.numerics.reference import likeliest as reference


def likeliest(
    logits: Float[Tensor, "rows vocabulary"],
) -> tuple[Int64[Tensor, " rows"], Float64[Tensor, "3 rows"]]:
    """Tokens, of equals the first; and in float64 tokens, log-probabilities, ones."""
    if logits.is_cuda and logits.is_floating_point() and logits.itemsize <= 4:
        from benthic.kernels import likeliest as kernel

        return kernel.likeliest(logits)
    return reference.likeliest(logits)

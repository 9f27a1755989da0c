"""A linear layer with block-scaled e4m3 weights, for decoding. Reference: numerics/reference/decode_matmul_fp8.py."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from benthic.numerics.reference.quantisation import dequantise_blocks

MOST_TOKENS = 64
"""Rows of x for which the weights' bytes set the pace, and the GPU has a kernel of its own."""


def decode_matmul_fp8(
    x: Float[Tensor, "tokens depth"],
    weight: Float[Tensor, "rows depth"],
    scales: Float32[Tensor, "row_blocks depth_blocks"],
) -> Float[Tensor, "tokens rows"]:
    """x times weight transposed, in x's dtype; `scales` give e4m3 values back, one for each 128 x 128.

    More than MOST_TOKENS rows, and other devices, multiply by a weight that is given back first, for this call.
    """
    if x.is_cuda and len(x) <= MOST_TOKENS:
        from benthic.kernels import decode_matmul_fp8 as kernel

        return kernel.decode_matmul_fp8(x, weight, scales)
    return F.linear(x, dequantise_blocks(weight, scales, dtype=x.dtype))

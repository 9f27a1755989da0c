"""A linear layer with block-scaled e4m3 weights, in plain torch."""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor

from benthic.numerics.reference.quantisation import dequantise_blocks


def decode_matmul_fp8(
    x: Float[Tensor, "tokens depth"],
    weight: Float[Tensor, "rows depth"],
    scales: Float32[Tensor, "row_blocks depth_blocks"],
) -> Float[Tensor, "tokens rows"]:
    """x times the weight that e4m3 values and factors give back, transposed; summed in float32."""
    return (x.float() @ dequantise_blocks(weight, scales).T).type_as(x)

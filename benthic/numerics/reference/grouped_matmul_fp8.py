"""Plain torch for benthic.kernels.grouped_matmul_fp8: the same products in float32."""

import torch
from torch import Tensor

from benthic.numerics.reference.quantise import dequantise_rows, dequantise_weights


def grouped_matmul_fp8(values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, ends: Tensor) -> Tensor:
    """values [T, K] (1 x 128) times the transpose of each group's weight [E, N, K] (128 x 128) -> bfloat16 [T, N]."""
    left = dequantise_rows(values, scales)
    right = dequantise_weights(weight, weight_scales)
    result = torch.zeros(values.shape[0], weight.shape[1], device=values.device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        result[start:end] = left[start:end] @ right[expert].T
        start = end
    return result.bfloat16()

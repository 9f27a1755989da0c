"""Plain torch for benthic.kernels.grouped_weight_gradient_fp8: the same products in float32."""

import torch
from torch import Tensor

from benthic.numerics.reference.quantise import BLOCK, dequantise_rows, group_blocks


def grouped_weight_gradient_fp8(
    gradient: Tensor,
    gradient_scales: Tensor,
    inputs: Tensor,
    input_scales: Tensor,
    ends: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """gradient [M, P] and inputs [N, P], transposed copies of quantise_columns -> [E, M, N], a sum over each group."""
    result = torch.zeros(len(ends), gradient.shape[0], inputs.shape[0], device=gradient.device)
    for expert, (block, count, _) in enumerate(group_blocks(ends)):
        columns, blocks = slice(block * BLOCK, (block + count) * BLOCK), slice(block, block + count)
        left = dequantise_rows(gradient[:, columns], gradient_scales[blocks])
        right = dequantise_rows(inputs[:, columns], input_scales[blocks])
        result[expert] = left @ right.T
    return result.to(dtype)


def token_groups(tokens: int, rows: int, columns: int, device: torch.device) -> int:
    """One: a processor has nothing to fill."""
    return 1

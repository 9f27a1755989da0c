"""x @ weight.T where x may be a token or a few: the products of a decoding step. No gradients.

cuBLAS takes 6 to 8 us for 8 to 15 MB of weights and one token, with a second launch where it splits their width; their
bytes take 2 to 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MOST_TOKENS, MOST_WIDTH = 4, 4096


def few_token_linear(
    x: Float[Tensor, "*tokens into"], weight: Float[Tensor, "out into"], dtype: torch.dtype | None = None
) -> Float[Tensor, "*tokens out"]:
    """x @ weight.T in `dtype`, or x's; where that is float32, products are summed in it too."""
    tokens, width = x.numel() // x.shape[-1], x.shape[-1]
    in_bfloat16 = x.dtype == weight.dtype == torch.bfloat16
    if x.is_cuda and in_bfloat16 and 0 < tokens <= MOST_TOKENS and width <= MOST_WIDTH and x.stride(-1) == 1:
        from benthic.kernels import few_token_linear as kernel

        return kernel.few_token_linear(x.reshape(tokens, width), weight, dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight) if dtype in (None, x.dtype) else F.linear(x.to(dtype), weight.to(dtype))

"""x @ weight.T for one or a few tokens: a program reads a few rows of the weights whole, and waits once.

At 8 MB a product is over before tensor cores have anything to wait for: what counts is that all bytes are asked for at
once. Products stay in registers, a number a channel, and are summed when the row is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOKENS = 4
MOST_WIDTH = 4096
"""Of more channels the loads no longer fit into registers all at once."""


def few_token_linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, K] of any row stride, T up to 4, weight [N, K] -> [T, N] in `dtype` (x's), summed in float32."""
    tokens, width = x.shape
    if not 0 < tokens <= MOST_TOKENS or not 0 < width <= MOST_WIDTH or weight.shape[1] != width:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; this kernel is for 1 to {MOST_TOKENS} "
            f"tokens and widths up to {MOST_WIDTH}"
        )
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x and weight need contiguous channels, not strides {x.stride()} and {weight.stride()}")
    out = x.new_empty((tokens, len(weight)), dtype=dtype or x.dtype)
    padded = triton.next_power_of_2(tokens)
    # 8 sums of 1,024 channels are 64 registers of each thread.
    rows = 8 // padded
    _linear[(triton.cdiv(len(weight), rows),)](
        x, weight, out, tokens, x.stride(0), N=len(weight), K=width, TOKENS=padded, ROWS=rows,
        DEPTH=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T"])
def _linear(
    x, weight, out, T, x_stride, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None]
    t = tl.arange(0, TOKENS)[:, None, None]
    total = tl.zeros((TOKENS, ROWS, DEPTH), tl.float32)
    for first in tl.static_range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)[None, None, :]
        part = tl.load(weight + n.to(tl.int64) * K + k, mask=(n < N) & (k < K), other=0.0).to(tl.float32)
        total += part * tl.load(x + t * x_stride + k, mask=(t < T) & (k < K), other=0.0).to(tl.float32)
    t = tl.arange(0, TOKENS)[:, None]
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    tl.store(out + t * N + n, tl.sum(total, 2).to(out.dtype.element_ty), mask=(t < T) & (n < N))

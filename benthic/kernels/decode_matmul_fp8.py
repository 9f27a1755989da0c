"""A linear layer with block-scaled e4m3 weights for the few rows of a decoding step; the weights' bytes set the pace.

The weights take the place of the tensor cores' rows, the tokens that of their columns (16 to 64). K is cut into shares
so that all multiprocessors have something to read; their sums are added in a fixed order by a second launch. e4m3
becomes bfloat16 in registers: activations are not quantised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.paged_context import multiprocessors

ROWS, DEPTH = 32, 128
MOST_TOKENS = 64


def decode_matmul_fp8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N] in x's dtype, for M up to 64.

    weight float8_e4m3fn with scales float32 [ceil(N / 128), ceil(K / 128)], the factors that give it back. Products are
    summed in float32 over 128 of K, scaled, and added. K must be a multiple of 16.
    """
    _check(x, weight, scales)
    (tokens, depth), rows = x.shape, len(weight)
    out = x.new_empty((tokens, rows))
    if not tokens:
        return out
    shares = _shares(tokens, triton.cdiv(rows, ROWS), depth, x.device)
    columns = max(16, triton.next_power_of_2(tokens))
    partial = x.new_empty((shares, tokens, rows), dtype=torch.float32) if shares > 1 else out
    _share[(triton.cdiv(rows, ROWS), shares)](
        x, weight, scales, partial, tokens, N=rows, K=depth, ROWS=ROWS, COLUMNS=columns, DEPTH=DEPTH,
        num_warps=4 if columns == 16 else 8, num_stages=4,
    )  # fmt: skip
    if shares > 1:
        _sum[(triton.cdiv(tokens * rows, 256),)](partial, out, tokens * rows, shares, BLOCK=256, num_warps=2)
    return out


def _shares(tokens: int, programs: int, depth: int, device: torch.device) -> int:
    """Enough for about four programs a multiprocessor, each with at least four steps of K, and no more than lets sums
    (8 bytes a token and weight row, written and read) be a quarter of the weights' bytes."""
    wanted = triton.cdiv(4 * multiprocessors(device), programs)
    return max(1, min(wanted, triton.cdiv(depth, DEPTH) // 4, depth // (32 * tokens)))


def _check(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    if x.shape[0] > MOST_TOKENS:
        raise ValueError(f"x has {x.shape[0]} rows; this kernel is for up to {MOST_TOKENS}")
    if weight.dtype != torch.float8_e4m3fn or weight.shape[1] != x.shape[1] or weight.shape[1] % 16:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}; x {list(x.shape)} needs torch.float8_e4m3fn of as many "
            "columns, a multiple of 16"
        )
    shape = [triton.cdiv(size, 128) for size in weight.shape]
    if scales.dtype != torch.float32 or list(scales.shape) != shape:
        raise ValueError(f"scales must be torch.float32 {shape}, not {scales.dtype} {list(scales.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("scales", scales)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


@triton.jit(do_not_specialize=["M"])
def _share(
    x, weight, scales, partial, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (K + DEPTH - 1) // DEPTH
    share = tl.program_id(1)
    first = share * STEPS // tl.num_programs(1)
    last = (share + 1) * STEPS // tl.num_programs(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    weight_at = weight + n[:, None].to(tl.int64) * K + depth[None, :]
    x_at = x + m[:, None] * K + depth[None, :]
    scale_at = scales + (tl.program_id(0) * ROWS // 128) * STEPS
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(first, last):
        inside = (step * DEPTH + depth < K)[None, :]
        tile = tl.load(weight_at + step * DEPTH, mask=(n < N)[:, None] & inside, other=0.0)
        rows = tl.trans(tl.load(x_at + step * DEPTH, mask=(m < M)[:, None] & inside, other=0.0))
        result += tl.dot(tile.to(rows.dtype), rows) * tl.load(scale_at + step)
    at = partial + share * M * N + m[None, :] * N + n[:, None]
    tl.store(at, result.to(partial.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["size", "shares"])
def _sum(partial, out, size, shares, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(0, shares):
        total += tl.load(partial + share * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)

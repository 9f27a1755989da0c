"""Products with weights that exist in e4m3 alone, as DeepSeek-V3 publishes them: a factor for each 128 x 128.

No gradients. On a Hopper GPU few rows multiply weights that turn into bfloat16 in registers, and many rows are
quantised themselves, 1 x 128, for the FP8 tensor cores (arXiv:2412.19437, section 3.3): the weights' bytes set the
pace of the former, arithmetic that of the latter. Elsewhere a matrix is given back for the call that uses it, one
expert's at a time. Nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from benthic.numerics.reference.quantisation import dequantise_blocks
from benthic.ops import float8
from benthic.ops.decode_matmul_fp8 import MOST_TOKENS, decode_matmul_fp8
from benthic.ops.expert_decode import MOST_PAIRS, few_token_experts_fp8
from benthic.ops.expert_loop import experts_one_by_one
from benthic.ops.permutation import by_row, sort_by_expert, sum_choices


def linear_from_float8(
    x: Float[Tensor, "*tokens into"],
    weight: Float[Tensor, "out into"],
    scales: Float32[Tensor, "out_blocks into_blocks"],
) -> Float[Tensor, "*tokens out"]:
    """x times weight transposed, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if _quantises(x) and len(rows) > MOST_TOKENS:
        out = _many_rows(rows, weight, scales)
    else:
        out = decode_matmul_fp8(rows.contiguous(), weight, scales)
    return out.view(*x.shape[:-1], len(weight))


def experts_from_float8(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    gate_up_proj: Float[Tensor, "experts gate_and_up width"],
    gate_up_scales: Float32[Tensor, "experts gate_and_up_blocks width_blocks"],
    down_proj: Float[Tensor, "experts width gate_and_up//2"],
    down_scales: Float32[Tensor, "experts width_blocks gate_and_up_blocks//2"],
    count: int | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k weights[t, k] * FFN of experts[t, k] at x[t], in x's dtype; F is a multiple of 128. Choices of -1 are none;
    `count` is then how many are not."""
    stored = gate_up_proj, gate_up_scales, down_proj, down_scales
    if not _quantises(x):
        gate_up, down = _GivenBack(*stored[:2], x.dtype), _GivenBack(*stored[2:], x.dtype)
        return experts_one_by_one(x, experts, weights, gate_up, down, count)
    if count is None and experts.numel() <= MOST_PAIRS:
        return few_token_experts_fp8(x.contiguous(), experts, weights, *stored)
    return _many_rows_of_experts(x, experts, weights, *stored, count)


def _quantises(x: Tensor) -> bool:
    """Whether activations go to FP8 tensor cores where they are many."""
    return x.is_cuda


class _GivenBack:
    """A stack of e4m3 matrices whose numbers are made when they are asked for."""

    def __init__(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self._values, self._scales, self._dtype = values, scales, dtype

    def __getitem__(self, expert: int) -> Tensor:
        return dequantise_blocks(self._values[expert], self._scales[expert], dtype=self._dtype)

    def __len__(self) -> int:
        return len(self._values)


def _many_rows(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    kernels, rows = float8.arithmetic(x.device.type), float8.quantise_activation(x)
    return kernels.matmul(*rows, weight[None], scales[None], _whole(x))


def _whole(x: Tensor) -> Tensor:
    """All rows as the one group of a grouped product."""
    return torch.full((1,), len(x), dtype=torch.int32, device=x.device)


def _many_rows_of_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_scales: Tensor,
    down_proj: Tensor,
    down_scales: Tensor,
    count: int | None,
) -> Tensor:
    """What training's forward pass does. A token is quantised once, before its row is copied to its choices."""
    kernels = float8.arithmetic(x.device.type)
    permutation = sort_by_expert(experts, len(gate_up_proj), count)
    row_weights = by_row(weights, permutation)
    rows = kernels.take(*float8.quantise_activation(x), permutation.tokens)
    hidden = kernels.matmul(*rows, gate_up_proj, gate_up_scales, permutation.ends)  # [T K, 2F]
    active, active_scales, *_ = kernels.swiglu(hidden, row_weights)
    out = kernels.matmul(active, active_scales, down_proj, down_scales, permutation.ends)  # [T K, D]
    return sum_choices(out, permutation)

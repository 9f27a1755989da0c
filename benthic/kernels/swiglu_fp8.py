"""SwiGLU between two FP8 products, quantised as it is computed (arXiv:2412.19437, sections 3.3.2 and 3.3.3).

Forward takes what the gate and up projections left, in bfloat16, and writes what the down projection reads and what
backward needs, both e4m3: 7 bytes a channel and token. Backward, which computes the activation again, moves as many. A
program has 16 tokens and 128 channels, the reach of a scale. Scales are powers of two: see benthic.kernels.retile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.quantise import BLOCK, _scale, quantise_rows

TOKENS = 16


def swiglu_quantised(hidden: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, 2F], gate then up -> silu(gate) * up * weights and the two halves, quantised by rows.

    weights float32 [T], or None for ones. Results: values float8_e4m3fn [T, F] with scales float32 [ceil(F / 128), T],
    then hidden's values [T, 2F] with scales [2 ceil(F / 128), T], where up's follow gate's.
    """
    rows, channels = _check(hidden, weights)
    blocks = triton.cdiv(channels, BLOCK)
    values = hidden.new_empty((rows, channels), dtype=torch.float8_e4m3fn)
    scales = hidden.new_empty((blocks, rows), dtype=torch.float32)
    kept = hidden.new_empty((rows, 2 * channels), dtype=torch.float8_e4m3fn)
    kept_scales = hidden.new_empty((2 * blocks, rows), dtype=torch.float32)
    if rows:
        _forward[(blocks * triton.cdiv(rows, TOKENS),)](
            hidden, weights, values, scales, kept, kept_scales, rows, channels,
            WEIGHTED=weights is not None, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return values, scales, kept, kept_scales


def swiglu_gradient_quantised(
    gradient: Tensor, kept: Tensor, kept_scales: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """gradient [T, F] of swiglu_quantised's first result, and its last two -> the gradient of hidden [T, 2F] and that
    first result again, both quantised by rows (values, scales, values, scales), and the gradient float32 [T] of
    weights.

    Where F is no multiple of 128, a scale of the gradient reaches over the border of gate and up: it is then written
    in bfloat16 and quantised in a second pass.
    """
    rows, channels = gradient.shape
    _check(kept, weights)
    blocks, whole = triton.cdiv(channels, BLOCK), channels % BLOCK == 0
    values = gradient.new_empty((rows, channels), dtype=torch.float8_e4m3fn)
    scales = gradient.new_empty((blocks, rows), dtype=torch.float32)
    hidden = gradient.new_empty((rows, 2 * channels), dtype=torch.float8_e4m3fn if whole else gradient.dtype)
    hidden_scales = gradient.new_empty((2 * blocks, rows), dtype=torch.float32)
    parts = None if weights is None else gradient.new_empty((blocks, rows), dtype=torch.float32)
    if rows:
        _backward[(blocks * triton.cdiv(rows, TOKENS),)](
            gradient, kept, kept_scales, weights, hidden, hidden_scales, values, scales, parts, rows, channels,
            WEIGHTED=weights is not None, WHOLE=whole, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    if not whole:
        hidden, hidden_scales = quantise_rows(hidden, power_of_two=True)
    return hidden, hidden_scales, values, scales, None if parts is None else parts.sum(0)


def _check(hidden: Tensor, weights: Tensor | None) -> tuple[int, int]:
    rows, columns = hidden.shape
    if columns % 2 or not hidden.is_contiguous():
        raise ValueError(f"gate and up must be contiguous [T, 2F], not {list(hidden.shape)}, {hidden.stride()}")
    if weights is not None and (weights.shape != (rows,) or weights.dtype != torch.float32):
        raise ValueError(f"weights must be float32 [{rows}], not {weights.dtype} {list(weights.shape)}")
    return rows, columns // 2


@triton.jit
def _quantise(x, values, at, scales, inside, valid):
    """Stores x [TOKENS, 128] at `values` + `at`, and each row's scale at `scales`."""
    scale = _scale(tl.max(tl.abs(x), 1), True)
    tl.store(values + at, (x * (1.0 / scale)[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales, scale, mask=valid)


@triton.jit
def _forward(
    hidden, weights, values, scales, kept, kept_scales, T, F, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(F, 128)
    block = tl.program_id(0) % blocks
    t = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    f = block * 128 + tl.arange(0, 128)
    block = block.to(tl.int64)  # scales of many tokens are more than 2^31
    valid = t < T
    inside = valid[:, None] & (f < F)[None, :]
    at = t[:, None] * (2 * F) + f[None, :]
    gate = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)  # [TOKENS, 128]
    up = tl.load(hidden + at + F, mask=inside, other=0.0).to(tl.float32)
    active = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        active = active * tl.load(weights + t, mask=valid, other=0.0)[:, None]
    _quantise(active, values, t[:, None] * F + f[None, :], scales + block * T + t, inside, valid)
    _quantise(gate, kept, at, kept_scales + block * T + t, inside, valid)
    _quantise(up, kept, at + F, kept_scales + (blocks + block) * T + t, inside, valid)


@triton.jit
def _backward(
    gradient, kept, kept_scales, weights, hidden, hidden_scales, values, scales, parts, T, F,
    WEIGHTED: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, 128)
    block = tl.program_id(0) % blocks
    t = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    f = block * 128 + tl.arange(0, 128)
    block = block.to(tl.int64)  # scales of many tokens are more than 2^31
    valid = t < T
    inside = valid[:, None] & (f < F)[None, :]
    at, narrow = t[:, None] * (2 * F) + f[None, :], t[:, None] * F + f[None, :]
    gate_scale = tl.load(kept_scales + block * T + t, mask=valid, other=0.0)
    up_scale = tl.load(kept_scales + (blocks + block) * T + t, mask=valid, other=0.0)
    gate = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32) * gate_scale[:, None]  # [TOKENS, 128]
    up = tl.load(kept + at + F, mask=inside, other=0.0).to(tl.float32) * up_scale[:, None]
    grad = tl.load(gradient + narrow, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gated = gate * sigmoid
    active = gated * up
    if WEIGHTED:
        weight = tl.load(weights + t, mask=valid, other=0.0)[:, None]
        tl.store(parts + block * T + t, tl.sum(grad * active, 1), mask=valid)
        grad = grad * weight
        active = active * weight
    _quantise(active, values, narrow, scales + block * T + t, inside, valid)
    grad_gate = grad * up * (sigmoid + gated * (1.0 - sigmoid))
    grad_up = grad * gated
    if WHOLE:
        _quantise(grad_gate, hidden, at, hidden_scales + block * T + t, inside, valid)
        _quantise(grad_up, hidden, at + F, hidden_scales + (blocks + block) * T + t, inside, valid)
    else:
        tl.store(hidden + at, grad_gate.to(hidden.dtype.element_ty), mask=inside)
        tl.store(hidden + at + F, grad_up.to(hidden.dtype.element_ty), mask=inside)

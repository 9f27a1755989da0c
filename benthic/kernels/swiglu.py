"""SwiGLU, forward and backward, a pass over memory each; fp32 inside.

Gate and up come as two tensors, or joined in rows of 2F as the experts' first product leaves them. There a routing
weight may multiply each row; its gradient is a sum over the row, so that one program then takes whole rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [*, F]."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run_forward(_rows(gate), _rows(up), None, out)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d gate and d up, [*, F], contiguous."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty_like(grad_gate)
    _run_backward(_rows(grad), _rows(gate), _rows(up), None, _rows(grad_gate), _rows(grad_up), None, None)
    return grad_gate, grad_up


def weighted_swiglu(hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """weights[:, None] * silu(gate) * up: hidden [R, 2F] (gate, then up), weights fp32 [R] -> [R, F]."""
    gate, up = hidden.chunk(2, -1)
    out = hidden.new_empty(gate.shape)
    _run_forward(_rows(gate), _rows(up), weights, out)
    return out


def weighted_swiglu_backward(
    grad: Tensor, hidden: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d hidden [R, 2F], d weights fp32 [R] (None without weights), and weighted_swiglu's result [R, F] again, which
    the next product's weight gradient needs: 2 bytes an element of bf16 [R, F] here, 8 in a pass of its own."""
    gate, up = hidden.chunk(2, -1)
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_weights = None if weights is None else torch.empty_like(weights)
    out = hidden.new_empty(gate.shape)
    grad_gate, grad_up = grad_hidden.chunk(2, -1)
    _run_backward(_rows(grad), _rows(gate), _rows(up), weights, grad_gate, grad_up, grad_weights, out)
    return grad_hidden, grad_weights, out


def _rows(x: Tensor) -> Tensor:
    """x [*, F] as a matrix whose rows lie anywhere and whose columns lie side by side: a view, but of odd strides."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_forward(gate: Tensor, up: Tensor, weights: Tensor | None, out: Tensor) -> None:
    if gate.numel():
        rows, width = gate.shape
        grid = (triton.cdiv(rows, 16) * triton.cdiv(width, COLUMNS),)
        _forward[grid](
            gate, up, weights, out, rows, width, gate.stride(0), up.stride(0), ROWS=16, COLUMNS=COLUMNS, num_warps=4
        )


def _run_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None,
    grad_gate: Tensor, grad_up: Tensor, grad_weights: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    if gate.numel():
        rows, width = gate.shape
        span = COLUMNS if weights is None else triton.cdiv(width, COLUMNS) * COLUMNS
        tile = 16 if weights is None else 8
        grid = (triton.cdiv(rows, tile) * triton.cdiv(width, span),)
        _backward[grid](
            grad, gate, up, weights, grad_gate, grad_up, grad_weights, out, rows, width,
            grad.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0),
            SPAN=span, ROWS=tile, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def _forward(gate, up, weights, out, R, F, gate_stride, up_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(F, COLUMNS)
    r = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (c < F)[None, :]
    g = tl.load(gate + r[:, None] * gate_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + r[:, None] * up_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    active = g * tl.sigmoid(g) * u
    if weights is not None:
        active *= tl.load(weights + r, mask=r < R, other=0.0)[:, None]
    tl.store(out + r[:, None] * F + c[None, :], active.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, gate, up, weights, grad_gate, grad_up, grad_weights, out, R, F,
    grad_stride, gate_stride, up_stride, grad_gate_stride,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, SPAN)
    r = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * SPAN
    weight = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if weights is not None:
        weight = tl.load(weights + r, mask=r < R, other=0.0)[:, None]
    for offset in range(0, SPAN, COLUMNS):
        c = first + offset + tl.arange(0, COLUMNS)
        inside = (r < R)[:, None] & (c < F)[None, :]
        d = tl.load(grad + r[:, None] * grad_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + r[:, None] * gate_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + r[:, None] * up_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        gated = g * s
        active = gated * u
        if weights is not None:
            total += d * active
            d *= weight
            active *= weight
        dg = d * u * (s + gated * (1.0 - s))  # silu' = s + g s (1 - s)
        at = r[:, None] * grad_gate_stride + c[None, :]
        tl.store(grad_gate + at, dg.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + at, (d * gated).to(grad_up.dtype.element_ty), mask=inside)
        if out is not None:
            tl.store(out + r[:, None] * F + c[None, :], active.to(out.dtype.element_ty), mask=inside)
    if weights is not None:
        tl.store(grad_weights + r, tl.sum(total, 1), mask=r < R)

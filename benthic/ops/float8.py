"""Matrix products of training in FP8 (arXiv:2412.19437, section 3.3). References: numerics/reference/{quantise, retile,
swiglu_fp8,grouped_matmul_fp8,grouped_weight_gradient_fp8}.py, which are also what runs on a processor.

All three products of a linear layer take e4m3 operands: weights in blocks of 128 x 128, activations and gradients in
tiles of 1 x 128 (128 x 128 for gradients diverges, section B.2 of the paper) whose scales are powers of two. The weight
gradient needs its operands in tiles of 128 x 1, down the tokens: they are cut anew from the tiles of 1 x 128, and
between powers of two this moves exponents alone. So each tensor is quantised once, one byte an element is kept for the
backward pass, and operations that read the same tensor share it (`Float8Rows`). docs/kernels-fp8.md has the errors.

What is kept: a linear layer keeps its input, in FP8; a feed-forward also what SwiGLU takes, in FP8, and computes its
output again (section 3.3.3). The output projection keeps the attention's output as it is: attention keeps the same
memory for its own backward, so that a second copy, in the paper's E5M6 or anything else, would only add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float8e4m3fn, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.permutation import Permutation, by_choice, by_row, sort_by_expert, sum_choices


class Float8Rows(NamedTuple):
    """Activations or gradients by rows: a scale for 128 columns of a row, scales block-major."""

    values: Float8e4m3fn[Tensor, "tokens width"]
    scales: Float32[Tensor, "blocks tokens"]


class Float8Weight(NamedTuple):
    """Matrices [E, N, K] in blocks of 128 x 128, and transposed for the gradient of what they multiply."""

    values: Float8e4m3fn[Tensor, "experts out into"]
    scales: Float32[Tensor, "experts out_blocks into_blocks"]
    transposed: Float8e4m3fn[Tensor, "experts into out"]
    transposed_scales: Float32[Tensor, "experts into_blocks out_blocks"]


class Arithmetic(NamedTuple):
    """What the operations below are made of, on one kind of device. `rows` and `gradient_rows` quantise [T, C]."""

    rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    gradient_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    columns: Callable[..., tuple[Tensor, Tensor]]
    weights: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    retile: Callable[..., tuple[Tensor, Tensor]]
    take: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    swiglu_gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    matmul: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    token_groups: Callable[[int, int, int, torch.device], int]


@cache
def arithmetic(device_type: str) -> Arithmetic:
    """Kernels for a Hopper GPU, their references for a processor."""
    if device_type == "cuda":
        from benthic.kernels import (
            grouped_matmul_fp8,
            grouped_weight_gradient_fp8,
            quantise,
            retile,
            swiglu_fp8,
        )
    else:
        from benthic.numerics.reference import (
            grouped_matmul_fp8,
            grouped_weight_gradient_fp8,
            quantise,
            retile,
            swiglu_fp8,
        )

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantise.quantise_rows(x, power_of_two=True)

    return Arithmetic(
        rows=rows,
        gradient_rows=rows,
        columns=quantise.quantise_columns,
        weights=quantise.quantise_weights_with_transpose,
        retile=retile.retile_columns,
        take=retile.take_quantised_rows,
        swiglu=swiglu_fp8.swiglu_quantised,
        swiglu_gradient=swiglu_fp8.swiglu_gradient_quantised,
        matmul=grouped_matmul_fp8.grouped_matmul_fp8,
        weight_gradient=grouped_weight_gradient_fp8.grouped_weight_gradient_fp8,
        token_groups=grouped_weight_gradient_fp8.token_groups,
    )


@torch.no_grad()
def quantise_weight(*weights: Float[Tensor, "*_experts _out into"]) -> Float8Weight:
    """One stack [E, N, K], or matrices [N, K] that read the same input, below one another as one [1, sum N, K]."""
    if weights[0].ndim == 2:
        weights = (torch.cat(weights)[None] if len(weights) > 1 else weights[0][None],)
    return Float8Weight(*arithmetic(weights[0].device.type).weights(weights[0].contiguous()))


@torch.no_grad()
def quantise_activation(x: Float[Tensor, "*tokens width"]) -> Float8Rows:
    """What several operations below take as `rows` instead of quantising the same `x` again."""
    return Float8Rows(*arithmetic(x.device.type).rows(_matrix(x)))


def linear_fp8(
    x: Float[Tensor, "*tokens into"],
    weights: Sequence[Float[Tensor, "_out into"]],
    quantised: Float8Weight,
    rows: Float8Rows | None = None,
) -> Float[Tensor, "*tokens out"]:
    """x times the transpose of `weights`, below one another, in x's dtype; keeps `rows` alone for backward.

    `quantised` is quantise_weight(*weights), which get the gradients. Widths must be multiples of 16.
    """
    return _Linear.apply(x, quantise_activation(x) if rows is None else rows, quantised, *weights)


def output_linear_fp8(
    x: Float[Tensor, "*tokens into"], weight: Float[Tensor, "out into"], quantised: Float8Weight
) -> Float[Tensor, "*tokens out"]:
    """linear_fp8 of an `x` that is kept anyway, by whoever made it: quantised again in backward, from x itself."""
    return _Linear.apply(x, None, quantised, weight)


def feed_forward_fp8(
    x: Float[Tensor, "*tokens width"],
    weights: tuple[Float[Tensor, "inner width"], Float[Tensor, "inner width"], Float[Tensor, "width inner"]],
    gate_up: Float8Weight,
    down: Float8Weight,
    rows: Float8Rows | None = None,
) -> Float[Tensor, "*tokens width"]:
    """down(silu(gate x) * up x) of weights gate, up and down; `gate_up` is quantise_weight(gate, up)."""
    rows = quantise_activation(x) if rows is None else rows
    return _FeedForward.apply(x, rows, None, None, gate_up, down, None, *weights)


def routed_experts_fp8(
    x: Float[Tensor, "tokens width"],
    experts: Int64[Tensor, "tokens chosen"],
    weights: Float32[Tensor, "tokens chosen"],
    parameters: tuple[Float[Tensor, "experts gate_and_up width"], Float[Tensor, "experts width inner"]],
    gate_up: Float8Weight,
    down: Float8Weight,
    rows: Float8Rows | None = None,
    residual: Float[Tensor, "tokens width"] | None = None,
    count: int | None = None,
) -> Float[Tensor, "tokens width"]:
    """sum_k FFN of experts[t, k] at x[t], plus residual[t], of `parameters` gate_up_proj and down_proj; weights[t, k]
    multiplies the activation before down_proj. Choices of -1 are none; `count` is then how many are not. Experts may
    have no tokens, and x no rows; nothing waits for a GPU."""
    rows = quantise_activation(x) if rows is None else rows
    permutation = sort_by_expert(experts, len(parameters[0]), count)
    return _FeedForward.apply(x, rows, permutation, weights, gate_up, down, residual, *parameters)


def _matrix(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


@lru_cache(maxsize=256)
def _even_groups(tokens: int, groups: int, device: torch.device) -> Tensor:
    """Ends of `groups` groups of tokens; kept, because every layer asks for the same few."""
    with torch.inference_mode(False):
        return (torch.arange(1, groups + 1, device=device) * tokens // groups).int()


def _one_group(x: Tensor) -> Tensor:
    return _even_groups(len(x), 1, x.device)


def _dense_weight_gradient(gradient: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """gradient [T, M] by rows times inputs [T, N], by rows in FP8 or as they are: [M, N], summed over tokens."""
    tokens, device = len(gradient[0]), gradient[0].device
    kernels = arithmetic(device.type)
    groups = kernels.token_groups(tokens, gradient[0].shape[1], inputs[0].shape[1], device)
    ends = _even_groups(tokens, groups, device)
    columns = kernels.retile(*inputs, ends) if len(inputs) == 2 else kernels.columns(_matrix(inputs[0]), ends)
    left = kernels.retile(*gradient, ends)
    if groups == 1:
        return kernels.weight_gradient(*left, *columns, ends, dtype)[0]
    return kernels.weight_gradient(*left, *columns, ends).sum(0).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Float8Rows | None, weight: Float8Weight, *parameters: Tensor) -> Tensor:
        kernels = arithmetic(x.device.type)
        inputs = kernels.rows(_matrix(x)) if rows is None else rows
        ctx.weight, ctx.parameters, ctx.shape = weight, parameters, x.shape  # weights are no activations: not saved
        ctx.save_for_backward(*((x,) if rows is None else rows))
        out = kernels.matmul(*inputs, weight.values, weight.scales, _one_group(inputs[0]))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        grad = _matrix(grad_outputs[0])
        kernels, ends, weight = arithmetic(grad.device.type), _one_group(grad), ctx.weight
        rows = kernels.gradient_rows(grad)
        grad_x, parts = None, (None,) * len(ctx.parameters)
        if ctx.needs_input_grad[0]:
            grad_x = kernels.matmul(*rows, weight.transposed, weight.transposed_scales, ends).view(ctx.shape)
        if any(ctx.needs_input_grad[3:]):
            whole = _dense_weight_gradient(rows, ctx.saved_tensors, ctx.parameters[0].dtype)
            parts = whole.split([len(parameter) for parameter in ctx.parameters])
        return grad_x, None, None, *parts


class _FeedForward(torch.autograd.Function):
    """One expert that all tokens go through (no permutation), or many that each have their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Float8Rows,
        permutation: Permutation | None,
        weights: Tensor | None,
        gate_up: Float8Weight,
        down: Float8Weight,
        residual: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        kernels = arithmetic(x.device.type)
        ends, inputs, row_weights = _one_group(rows.values), tuple(rows), None
        if permutation is not None and weights is not None:
            ends, inputs = permutation.ends, kernels.take(*rows, permutation.tokens)
            row_weights = by_row(weights, permutation)
        hidden = kernels.matmul(*inputs, gate_up.values, gate_up.scales, ends)  # [rows, 2F]
        active, active_scales, kept, kept_scales = kernels.swiglu(hidden, row_weights)
        del inputs, hidden  # the largest arrays of a step: freed as soon as they can be
        out = kernels.matmul(active, active_scales, down.values, down.scales, ends)
        if permutation is not None:
            out = sum_choices(out, permutation, residual)
        ctx.gate_up, ctx.down, ctx.parameters, ctx.shape = gate_up, down, parameters, x.shape
        ctx.save_for_backward(*rows, kept, kept_scales, row_weights, *(permutation or (None, None, None)))
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        values, scales, kept, kept_scales, row_weights, tokens, places, ends = ctx.saved_tensors
        grad = _matrix(grad_outputs[0])
        kernels, gate_up, down = arithmetic(grad.device.type), ctx.gate_up, ctx.down
        dtype = ctx.parameters[0].dtype
        rows = kernels.gradient_rows(grad)
        taken = rows if tokens is None else kernels.take(*rows, tokens)
        ends = _one_group(grad) if ends is None else ends
        grad_active = kernels.matmul(*taken, down.transposed, down.transposed_scales, ends)
        of_swiglu = kernels.swiglu_gradient(grad_active, kept, kept_scales, row_weights)
        grad_hidden, active, grad_weights = of_swiglu[:2], of_swiglu[2:4], of_swiglu[4]
        del taken, grad_active, of_swiglu
        grad_x = kernels.matmul(*grad_hidden, gate_up.transposed, gate_up.transposed_scales, ends)
        if grad_weights is None:
            grad_gate_up = _dense_weight_gradient(grad_hidden, (values, scales), dtype)
            parts = *grad_gate_up.chunk(2), _dense_weight_gradient(rows, active, dtype)
        else:
            grad_x = sum_choices(grad_x, Permutation(tokens, places, ends))
            grad_weights = by_choice(grad_weights, places)
            inputs = kernels.retile(values, scales, ends, tokens)
            grad_gate_up = kernels.weight_gradient(*kernels.retile(*grad_hidden, ends), *inputs, ends, dtype)
            gradient = kernels.retile(*rows, ends, tokens)
            parts = grad_gate_up, kernels.weight_gradient(*gradient, *kernels.retile(*active, ends), ends, dtype)
        residual = grad_outputs[0] if ctx.needs_input_grad[6] else None
        return grad_x.view(ctx.shape), None, None, grad_weights, None, None, residual, *parts

"""The path a GPU takes, on a processor, for tests that count what autograd keeps and what is allocated or moved.

The autograd functions are those of benthic.ops, so that what they keep is what they keep on a GPU. Replaced are the
kernels beneath them, by functions that allocate what the kernel allocates and compute nothing, and torch's fused
attention by a function that keeps what cuDNN's does: query, key, value, output, logsumexp.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import benthic.kernels
from benthic import ops
from benthic.ops.float8 import Arithmetic
from benthic.ops.recomputation import cheap

MOVED: list[tuple[str, float]] = []
"""Names of the kernels that ran, and the bytes of their tensors, in and out; products leave none."""


def size(tensor: torch.Tensor) -> int:
    """Bytes, those of a broadcast dimension once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def kernel(function: Callable) -> Callable:
    """`function` as one kernel: what it does is no operation of torch's, and its tensors are read or written once."""

    @wraps(function)
    def launched(*args, **kwargs):
        with _disable_current_modes():
            result = function(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs, result)) if torch.is_tensor(one)]
        MOVED.append((function.__name__, sum(map(size, tensors))))
        return result

    return launched


def _floats(like, *shape):
    return like.new_zeros(shape, dtype=torch.float32)


@kernel
def rms_norm(x, weight, eps):
    return x.new_zeros(x.shape), _floats(x, len(x))


@kernel
def add_rms_norm(residual, x, weight, eps):
    return x.new_zeros(x.shape), x.new_zeros(x.shape), _floats(x, len(x))


@kernel
def rms_norm_backward(grad, x, weight, inverse):
    return x.new_zeros(x.shape), torch.zeros_like(weight)


@kernel
def add_rms_norm_backward(grad_total, grad_normed, total, weight, inverse):
    return total.new_zeros(total.shape), torch.zeros_like(weight)


def latent_heads(query, expanded, rotary_key, rotations, interleaved):
    own = query.shape[3] - rotary_key.shape[2]
    return _latent_heads(query, expanded[..., :own], rotary_key)


@kernel
def _latent_heads(query, own_key, rotary_key):
    return query.new_zeros(query.shape), query.new_zeros(query.shape)


@kernel
def latent_heads_backward(grad_query, grad_key, grad_value, rotations, interleaved):
    batch, positions, heads, width = grad_query.shape
    turned = 2 * rotations.shape[1]
    expanded = width - turned + grad_value.shape[3]
    return (
        grad_query.new_zeros(grad_query.shape),
        grad_query.new_zeros(batch, positions, heads, expanded),
        grad_query.new_zeros(batch, positions, turned),
    )


@kernel
def rotary(x, rotations, interleaved, inverse=False):
    return x.new_zeros(x.shape)


@kernel
def swiglu(gate, up):
    return gate.new_zeros(gate.shape)


@kernel
def swiglu_backward(grad, gate, up):
    return gate.new_zeros(gate.shape), gate.new_zeros(gate.shape)


@kernel
def weighted_swiglu(hidden, weights=None):
    return hidden.new_zeros(len(hidden), hidden.shape[1] // 2)


@kernel
def weighted_swiglu_backward(grad, hidden, weights=None):
    return hidden.new_zeros(hidden.shape), torch.zeros_like(weights), grad.new_zeros(grad.shape)


@kernel
def sort_by_expert(experts, num_experts, count=None):
    """Loads that are even, whatever was chosen."""
    rows, device = experts.numel(), experts.device
    ends = torch.arange(1, num_experts + 1, device=device) * rows // num_experts
    order = torch.arange(rows, device=device)
    return order // experts.shape[1], order.view(experts.shape), ends.int()


@kernel
def take_rows(x, places, count=None):
    return x.new_zeros(places.numel(), x.shape[1])


@kernel
def sum_choices(rows, places, residual=None):
    return rows.new_zeros(len(places), rows.shape[1])


@kernel
def chosen(logits, bias, config):
    experts = logits.new_zeros(len(logits), config.num_experts_per_tok, dtype=torch.int64)
    return torch.zeros_like(logits), experts, _floats(logits, *experts.shape)


@kernel
def chosen_backward(grad_scores, grad_weights, scores, experts, config):
    return torch.zeros_like(scores)


def float32_product(left, right):
    return _floats(left, left.shape[0], right.shape[1])


@kernel
def cross_entropy_(logits, targets, factor, with_gradient=True):
    return _floats(logits, len(logits))


def multiply_(x, factor):
    """Reads nothing: the factor is 1."""


def _quantised(like, *shape):
    """[..., rows, columns] in e4m3, which torch cannot fill everywhere."""
    return like.new_zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


@kernel
def quantise_rows(x):
    return _quantised(x, *x.shape), _floats(x, math.ceil(x.shape[1] / 128), len(x))


def _padded(rows, ends):
    return (rows // 128 + len(ends)) * 128


@kernel
def quantise_columns(x, ends):
    depth = _padded(len(x), ends)
    return _quantised(x, x.shape[1], depth), _floats(x, depth // 128, x.shape[1])


@kernel
def quantise_weights(weight):
    experts, rows, columns = weight.shape
    blocks = math.ceil(rows / 128), math.ceil(columns / 128)
    return (
        _quantised(weight, experts, rows, columns),
        _floats(weight, experts, *blocks),
        _quantised(weight, experts, columns, rows),
        _floats(weight, experts, *reversed(blocks)),
    )


def _read_again(values, tokens):
    """A token's row is read for each of its choices, and once is counted already."""
    MOVED.append(("rows read again", (len(tokens) - len(values)) * values.shape[1]))


@kernel
def retile(values, scales, ends, tokens=None):
    if tokens is not None:
        _read_again(values, tokens)
    depth = _padded(len(values if tokens is None else tokens), ends)
    return _quantised(values, values.shape[1], depth), _floats(values, depth // 128, values.shape[1])


@kernel
def take_quantised_rows(values, scales, tokens):
    _read_again(values, tokens)
    return _quantised(values, len(tokens), values.shape[1]), _floats(values, len(scales), len(tokens))


@kernel
def swiglu_quantised(hidden, weights):
    rows, inner = len(hidden), hidden.shape[1] // 2
    blocks = math.ceil(inner / 128)
    kept = _quantised(hidden, rows, 2 * inner), _floats(hidden, 2 * blocks, rows)
    return _quantised(hidden, rows, inner), _floats(hidden, blocks, rows), *kept


def swiglu_gradient_quantised(gradient, kept, kept_scales, weights):
    hidden, again, scales, grad_weights = _swiglu_gradient(gradient, kept, kept_scales, weights)
    if hidden.dtype == torch.float8_e4m3fn:
        quantised = hidden, _floats(gradient, len(kept_scales), len(gradient))
    else:
        quantised = quantise_rows(hidden)
    return *quantised, again, scales, grad_weights


@kernel
def _swiglu_gradient(gradient, kept, kept_scales, weights):
    whole = gradient.shape[1] % 128 == 0
    hidden = _quantised(gradient, *kept.shape) if whole else gradient.new_zeros(kept.shape)
    again = _quantised(gradient, *gradient.shape), _floats(gradient, len(kept_scales) // 2, len(gradient))
    return hidden, *again, None if weights is None else torch.zeros_like(weights)


def product_fp8(values, scales, weight, weight_scales, ends):
    return values.new_zeros(len(values), weight.shape[1], dtype=torch.bfloat16)


def weight_gradient_fp8(gradient, gradient_scales, inputs, input_scales, ends, dtype=torch.float32):
    return gradient.new_zeros(len(ends), len(gradient), len(inputs), dtype=dtype)


FLOAT8 = Arithmetic(
    rows=quantise_rows,
    gradient_rows=quantise_rows,
    columns=quantise_columns,
    weights=quantise_weights,
    retile=retile,
    take=take_quantised_rows,
    swiglu=swiglu_quantised,
    swiglu_gradient=swiglu_gradient_quantised,
    matmul=product_fp8,
    weight_gradient=weight_gradient_fp8,
    token_groups=lambda tokens, rows, columns, device: 1,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[:-1], device=query.device))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        # The query's gradient is summed in float32.
        query.new_zeros(query.shape, dtype=torch.float32)
        return torch.zeros_like(query), torch.zeros_like(key), value.new_zeros(value.shape)


def _module(name: str) -> ModuleType:
    """A module of benthic.ops; some have a function of the same name in front of them."""
    return import_module(f"benthic.ops.{name}")


def _kernels(**functions: Callable) -> ModuleType:
    module = ModuleType("kernels that allocate")
    vars(module).update(functions)
    return module


def take_gpu_path(patch: pytest.MonkeyPatch) -> None:
    """Make benthic.ops choose as on a GPU, with kernels that only allocate."""
    norms = _kernels(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rms_norm_backward=rms_norm_backward,
        add_rms_norm_backward=add_rms_norm_backward,
    )
    heads = _kernels(latent_heads=latent_heads, latent_heads_backward=latent_heads_backward)
    loss = _kernels(cross_entropy_=cross_entropy_, multiply_=multiply_)
    for name, kernels in (
        ("rms_norm", norms),
        ("latent_heads", heads),
        ("rotary", _kernels(rotary=rotary)),
        ("cross_entropy", loss),
    ):
        patch.setitem(sys.modules, f"benthic.kernels.{name}", kernels)
        patch.setattr(benthic.kernels, name, kernels, raising=False)
    gated = _kernels(
        swiglu=swiglu,
        swiglu_backward=swiglu_backward,
        weighted_swiglu=weighted_swiglu,
        weighted_swiglu_backward=weighted_swiglu_backward,
    )
    rows = _kernels(sort_by_expert=sort_by_expert, take_rows=take_rows, sum_choices=sum_choices)
    patch.setattr(_module("norm"), "_has_kernel", lambda x: True)
    patch.setattr(_module("swiglu"), "_implementation", lambda x: gated)
    patch.setattr(_module("permutation"), "_implementation", lambda x: rows)
    patch.setattr(_module("route"), "_kernels", lambda: _kernels(route=chosen, route_backward=chosen_backward))
    patch.setattr(_module("route"), "_product", float32_product)
    patch.setattr(_module("linear_cross_entropy"), "_float32_product", float32_product)
    patch.setattr(_module("float8"), "arithmetic", lambda device: FLOAT8)
    _choose_as_on_a_gpu(patch)
    _add_without_copies(patch)


def _add_without_copies(patch: pytest.MonkeyPatch) -> None:
    """A processor casts a bfloat16 summand of a float32 tensor in memory, a GPU in registers."""
    plain = torch.Tensor.add_
    patch.setattr(torch.Tensor, "add_", lambda x, other: plain(x, other) if x.dtype == other.dtype else x)


def _choose_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Operations whose first line asks whether a tensor is a GPU's."""
    plain_logits = ops.router_logits

    def router_logits(x, weight):
        function = _module("route")._RouterLogits
        return function.apply(x, weight) if x.dtype == torch.bfloat16 else plain_logits(x, weight)

    def route(logits, bias, config):
        return ops.Routing(*_module("route")._Route.apply(logits, bias, config))

    def linear_cross_entropy(hidden, weight, targets, divisor=1):
        loss = _module("linear_cross_entropy")._InPlace.apply(hidden, weight, targets, divisor)
        return loss, (targets != -100).sum()

    patch.setattr(ops, "latent_heads", cheap(_module("latent_heads")._KernelLatentHeads.apply))
    patch.setattr(ops, "rotary", _module("rotary")._KernelRotary.apply)
    patch.setattr(ops, "swiglu", cheap(_module("swiglu")._Swiglu.apply))
    patch.setattr(ops, "routed_experts", _module("experts")._grouped)
    patch.setattr(ops, "router_logits", router_logits)
    patch.setattr(ops, "route", route)
    patch.setattr(ops, "attention", lambda query, key, value, scale, mask=None: _Attention.apply(query, key, value))
    patch.setattr(import_module("benthic.train.loss"), "linear_cross_entropy", linear_cross_entropy)


LATENT = dict(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
PLAIN = dict(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SHAPES = {
    "latent": LATENT,
    "latent with prediction": LATENT | dict(num_nextn_predict_layers=1, routed_scaling_factor=2.5),
    "latent without query compression": LATENT | dict(q_lora_rank=None, n_shared_experts=2),
    "norm after, experts": PLAIN
    | dict(norm_placement="after", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96),
    "softmax routing, unnormalised": LATENT
    | dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=4.0),
    "latent, halves rotated": LATENT | dict(rope_interleave=False),
    "grouped queries, halves rotated": PLAIN | dict(rope_interleave=False, qkv_bias=True),
    "two groups, wide": LATENT | dict(n_group=2, topk_group=1, hidden_size=256, num_hidden_layers=2),
    "grouped queries": PLAIN,
    "all heads, norm after, query-key norms": PLAIN
    | dict(num_key_value_heads=4, norm_placement="after", qk_norm=True, rope_interleave=False),
    "all heads with experts": PLAIN
    | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96),
}

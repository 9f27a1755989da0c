"""Choosing experts. Reference: numerics/reference/routing.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.config.model import ModelConfig
from benthic.ops.few_token_linear import MOST_TOKENS, MOST_WIDTH, few_token_linear


class Routing(NamedTuple):
    """Where tokens go: `scores` (sigmoid or softmax, before any bias), `experts` in no particular order, and the
    `weights` that multiply the experts' outputs. Of a rank that holds some experts alone, choices of the others are
    -1, and `count` is how many are not; None: all of them."""

    scores: Float32[Tensor, "tokens experts"]
    experts: Int64[Tensor, "tokens chosen"]
    weights: Float32[Tensor, "tokens chosen"]
    count: int | None = None


def router_logits(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "experts width"]
) -> Float32[Tensor, "tokens experts"]:
    """x @ weight.T in float32, whatever the dtype of both."""
    if x.is_cuda and not torch.is_grad_enabled() and len(x) <= MOST_TOKENS and x.shape[1] <= MOST_WIDTH:
        return few_token_linear(x, weight, torch.float32)
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
        # Products of bfloat16 numbers are exact in float32, so that this is the product of both in float32, at the
        # tensor cores' rate and without a copy of x twice its size.
        return _RouterLogits.apply(x, weight)
    return F.linear(x.float(), weight.float())


def route(
    logits: Float32[Tensor, "tokens experts"], bias: Float32[Tensor, " experts"] | None, config: ModelConfig
) -> Routing:
    """Experts of each token from router `logits` and the balancing `bias`.

    The bias moves the choice and never the weights (DeepSeek-V3, section 2.1.2).
    """
    if logits.is_cuda:
        # Some fifteen launches on small tensors become one, and as many of their backward another.
        return Routing(*_Route.apply(logits, bias, config))
    return _composed(logits, bias, config)


def _composed(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> Routing:
    """torch's operations one after another, and autograd's gradient."""
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    with torch.no_grad():
        choice = scores.detach() if bias is None else scores.detach() + bias
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            choice = _within_best_groups(choice, config)
        experts = choice.topk(config.num_experts_per_tok, sorted=False).indices
    weights = scores.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1.0:
        weights = weights * config.routed_scaling_factor
    return Routing(scores, experts, weights)


def _within_best_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """`choice` with -inf outside the topk_group best groups; a group's score is its two best summed (V3) or its
    best (V2)."""
    grouped = choice.unflatten(1, (config.n_group, -1))  # [T, G, E / G]
    if config.topk_method == "noaux_tc":
        group_scores = grouped.topk(2, sorted=False).values.sum(-1)
    else:
        group_scores = grouped.amax(-1)
    kept = group_scores.topk(config.topk_group, sorted=False).indices
    # Not 0: biases may be negative, and then a masked expert would beat a kept one.
    penalty = torch.full_like(group_scores, -torch.inf).scatter_(1, kept, 0.0)
    return (grouped + penalty[..., None]).flatten(1)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
        scores, experts, weights = _kernels().route(logits, bias, config)
        ctx.save_for_backward(scores, experts)
        ctx.config = config
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return scores, experts, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        grad_scores, _, grad_weights = grad_outputs
        return _kernels().route_backward(grad_scores, grad_weights, *ctx.saved_tensors, ctx.config), None, None


def _kernels() -> ModuleType:
    from benthic.kernels import route

    return route


class _RouterLogits(torch.autograd.Function):
    """The product of bfloat16 matrices in float32. The gradient of the logits is float32: split into three bfloat16
    parts, which hold its 24 bits, it makes exact products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        parts = _three_parts(grad)  # [T, 3 E]
        grad_x = torch.mm(parts, weight.repeat(3, 1))
        grad_weight = _product(parts.t(), x).view(3, *weight.shape).sum(0)
        return grad_x, grad_weight.type_as(weight)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def _three_parts(x: Tensor) -> Tensor:
    """float32 [T, E] as bfloat16 [T, 3 E]: what rounding leaves is exact, and rounded in turn."""
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return torch.cat((high, middle, (rest - middle).bfloat16()), 1)

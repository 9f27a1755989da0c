"""What cases of differentiable operations share: exact results and gradients, backward runs, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Runs = dict[str, Callable[[], Any]]


def backward(functions: Runs, leaves: list[Tensor], grads: list[Tensor]) -> Runs:
    """The backward pass alone of each; its forward pass is done once, when it is first asked for."""

    def run(function: Callable[[], Any]) -> Callable[[], tuple[Tensor, ...]]:
        kept: list[Any] = []

        def gradients() -> tuple[Tensor, ...]:
            if not kept:
                kept.append(function())
            return torch.autograd.grad(kept[0], leaves, grads, retain_graph=True)

        return gradients

    return {name: run(function) for name, function in functions.items()}


def exact(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results, then gradients of all inputs, from float32 arithmetic; rounded to what the runs return."""
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    results = function(*leaves)
    found = torch.autograd.grad(results, leaves, [grad.float() for grad in grads])
    return [x.detach().bfloat16() for x in (*results, *found)]


def error(expected: list[Tensor]) -> Callable[[Any], float]:
    """The largest of the relative errors, |found - expected| / |expected| over a tensor."""

    def check(found: Any) -> float:
        tensors = found if isinstance(found, tuple) else (found,)
        pairs = zip(tensors, expected, strict=True)
        return max(float((a.detach() - b).float().norm() / b.float().norm()) for a, b in pairs)

    return check

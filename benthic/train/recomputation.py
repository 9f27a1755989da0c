"""A pass over a finished model: which results of its layers backward computes again instead of keeping them.

"up_projections" drops what DeepSeek-V3 does (section 3.2.3): norm outputs, what is expanded from latents, SwiGLU's
products. Matrix products, the two that expand latents aside, and attention are never made twice. "layer" keeps each
layer's input and makes everything else again. Both leave gradients the same bit for bit, and what a layer returns (the
routing that loads are counted from) is that of the first time alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benthic.model.language_model import LanguageModel
from benthic.ops.recomputation import cheap, dropping_cheap_results

UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")
"""Projections whose inputs are latents, an order of magnitude smaller than their outputs."""


def recompute(model: LanguageModel, kind: Literal["none", "up_projections", "layer"]) -> None:
    """Make every layer of `model`, prediction layers included, train that way from now on; without gradients they
    work as before. Passes that change modules' classes, as `use_float8` does, may come before or after."""
    if kind == "none":
        return
    for layer in model.model.layers.children():
        if kind == "layer":
            layer.forward = _checkpointed(_forward_of(layer))
            continue
        for name in UP_PROJECTIONS:
            projection = getattr(layer.self_attn, name, None)
            if isinstance(projection, nn.Module):
                projection.forward = cheap(_forward_of(projection))
        layer.forward = _dropping(_forward_of(layer))


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of the class that `module` has when it is called: a bound method is that of its class now."""

    def forward(*args: Any) -> Any:
        return type(module).forward(module, *args)

    return forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def with_checkpoint(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # Nothing in a layer is random, and asking a GPU for its generator's state would wait for it.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return with_checkpoint


def _dropping(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def without_cheap_results(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        with dropping_cheap_results():
            return forward(*args)

    return without_cheap_results

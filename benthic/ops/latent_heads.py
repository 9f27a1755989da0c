"""Latent attention's heads out of its projections. Reference: numerics/reference/latent_heads.py."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex64, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops.recomputation import cheap
from benthic.ops.rotary import rotary, with_contiguous_channels


@cheap
def latent_heads(
    query: Float[Tensor, "batch positions heads key_width"],
    expanded: Float[Tensor, "batch positions heads own_and_value"],
    rotary_key: Float[Tensor, "batch positions rotary"],
    rotations: Complex64[Tensor, "positions rotary//2"],
    interleaved: bool,
) -> tuple[
    Float[Tensor, "batch positions heads key_width"],
    Float[Tensor, "batch positions heads key_width"],
    Float[Tensor, "batch positions heads own_and_value-key_width+rotary"],
]:
    """(query, key, value) as `attention` takes them: queries turned in their last R channels, keys of a head's own N
    channels of `expanded` and the one turned `rotary_key`, values the rest of `expanded` (a view of it).
    """
    if query.is_cuda:
        query, key, value = _KernelLatentHeads.apply(query, expanded, rotary_key, rotations, interleaved)
        # Fused attention reads 16 bytes at a time; only a head width that is no multiple of them needs the copy.
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return query, key, value if aligned else value.contiguous()
    heads, rotary_width = query.shape[2], rotary_key.shape[2]
    query, turning = query.split_with_sizes((query.shape[3] - rotary_width, rotary_width), -1)
    # Queries' and keys' rotary channels turn together: half as many small operations.
    turned = rotary(torch.cat((turning, rotary_key[:, :, None]), 2), rotations, interleaved)
    rotary_query, shared = turned.split_with_sizes((heads, 1), 2)  # [B, S, H, R], [B, S, 1, R]
    key, value = expanded.split_with_sizes((query.shape[3], expanded.shape[3] - query.shape[3]), -1)
    query = torch.cat((query, rotary_query), -1)
    key = torch.cat((key, shared.expand(-1, -1, heads, -1)), -1)  # [B, S, H, N + R]
    return query, key, value


class _KernelLatentHeads(torch.autograd.Function):
    """The Triton kernels of benthic.kernels.latent_heads. Only the rotations are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, expanded: Tensor, rotary_key: Tensor, rotations: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from benthic.kernels import latent_heads as kernels

        ctx.save_for_backward(rotations)
        ctx.interleaved = interleaved
        query, expanded, rotary_key = map(with_contiguous_channels, (query, expanded, rotary_key))
        turned, key = kernels.latent_heads(query, expanded, rotary_key, rotations, interleaved)
        return turned, key, expanded[..., query.shape[3] - rotary_key.shape[2] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        from benthic.kernels import latent_heads as kernels

        (rotations,) = ctx.saved_tensors
        query, key, value = map(with_contiguous_channels, grad_outputs)
        return *kernels.latent_heads_backward(query, key, value, rotations, ctx.interleaved), None, None

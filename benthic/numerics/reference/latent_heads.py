"""Queries, keys and values of latent attention out of its projections (DeepSeek-V2, section 2.1)."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from benthic.numerics.reference.rotary import rotary


def latent_heads(
    query: Float[Tensor, "batch positions heads key_width"],
    expanded: Float[Tensor, "batch positions heads own_and_value"],
    rotary_key: Float[Tensor, "batch positions rotary"],
    rotations: Complex[Tensor, "positions rotary//2"],
    interleaved: bool,
) -> tuple[
    Float[Tensor, "batch positions heads key_width"],
    Float[Tensor, "batch positions heads key_width"],
    Float[Tensor, "batch positions heads own_and_value-key_width+rotary"],
]:
    """(query, key, value): a query's last channels are turned, and a key is a head's own channels of `expanded` with
    the one turned `rotary_key` behind them."""
    own = query.shape[-1] - rotary_key.shape[-1]
    cos, sin = rotations.real, rotations.imag
    turned = rotary(query[..., own:], cos, sin, interleaved)
    shared = rotary(rotary_key[:, :, None], cos, sin, interleaved)
    query = torch.cat((query[..., :own], turned), -1)
    key = torch.cat((expanded[..., :own], shared.expand(-1, -1, query.shape[2], -1)), -1)
    return query, key, expanded[..., own:]

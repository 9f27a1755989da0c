"""Rotary position embedding (arXiv:2104.09864) and its length extensions.

Pair i of a head's R rotary channels turns by the angle position * frequency[i]. `interleaved` pairs channels (2i, 2i+1)
as DeepSeek's weights do, otherwise channel i is paired with i + R/2 as Llama's do. Both keep the order of channels,
so query-key products agree with every published implementation, whatever order that one caches.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from benthic.config.model import RopeParameters


def inverse_frequencies(rope: RopeParameters, width: int) -> Float32[Tensor, " {width}//2"]:
    """Angle per position of each pair. `width` is R, the number of rotating channels."""
    frequency = rope.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if rope.rope_type == "linear":
        return frequency / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, width, frequency)
    if rope.rope_type == "llama3":
        return _llama3(rope, frequency)
    return frequency


def _yarn(rope: RopeParameters, width: int, frequency: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): fast pairs keep their frequency, slow ones are divided by the factor."""

    original = _original_length(rope)

    def pair_turning(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # width - 1 and not width / 2 - 1, as released.
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / rope.factor * ramp


def _llama3(rope: RopeParameters, frequency: Tensor) -> Tensor:
    """Llama 3.1: wavelengths above original/low_freq_factor are divided by the factor, between the two blended."""
    original, low, high = _original_length(rope), rope.low_freq_factor, rope.high_freq_factor
    turns = original * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * keep + frequency / rope.factor * (1 - keep)


def _original_length(rope: RopeParameters) -> int:
    assert rope.original_max_position_embeddings is not None, f"RopeParameters checks it for {rope.rope_type}"
    return rope.original_max_position_embeddings


def rotation(
    rope: RopeParameters, width: int, positions: Shaped[Tensor, " positions"]
) -> tuple[Float32[Tensor, "positions {width}//2"], Float32[Tensor, "positions {width}//2"]]:
    """cos and sin of every pair at `positions`, YaRN's gain included."""
    angle = positions.float()[:, None] * inverse_frequencies(rope, width).to(positions.device)
    return angle.cos() * rope.rotation_gain, angle.sin() * rope.rotation_gain


def rotary(
    x: Float[Tensor, "*batch positions heads rotary"],
    cos: Float[Tensor, "positions rotary//2"],
    sin: Float[Tensor, "positions rotary//2"],
    interleaved: bool,
) -> Float[Tensor, "*batch positions heads rotary"]:
    """Rotate `x` by the table; channels keep their order."""
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

"""Rotary position embedding. Reference: numerics/reference/rotary.py.

On the processor a pair of channels is one complex number and a rotation one product, so an interleaved slice needs no
copy; on a GPU a kernel turns pairs in registers.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex64, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.config.model import ModelConfig
from benthic.numerics.reference.rotary import rotation


class RotaryTable:
    """Rotations of every position as complex64 [P, R / 2], computed once a device and grown by doubling."""

    def __init__(self, config: ModelConfig) -> None:
        self.rope = config.rope_parameters
        self.width = config.rotary_dim
        self.limit = config.max_position_embeddings
        self._tables: dict[torch.device, Tensor] = {}

    def rows(self, start: int, length: int, device: torch.device) -> Complex64[Tensor, "{length} {self.width}//2"]:
        """Rotations of positions start .. start + length."""
        table = self._tables.get(device)
        if table is None or len(table) < start + length:
            table = self._tables[device] = self._compute(start + length, device)
        return table[start : start + length]

    @torch.inference_mode(False)
    def _compute(self, needed: int, device: torch.device) -> Tensor:
        """A plain tensor even when generation asks first: training may use the same table later."""
        size = min(self.limit, max(256, 1 << (needed - 1).bit_length()))
        positions = torch.arange(max(size, needed), dtype=torch.float32)
        # On the processor and then copied, so that every device turns by the same angles.
        return torch.complex(*rotation(self.rope, self.width, positions)).to(device)


def rotary(
    x: Float[Tensor, "batch positions heads rotary"],
    table: Complex64[Tensor, "positions rotary//2"],
    interleaved: bool,
) -> Float[Tensor, "batch positions heads rotary"]:
    """Rotate `x` by `table` in float32; channels keep their order and dtype."""
    if x.is_cuda:
        return _KernelRotary.apply(x, table, interleaved)
    table = table[:, None]
    if interleaved:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)
    first, second = x.float().chunk(2, -1)
    turned = torch.complex(first, second) * table
    return torch.cat((turned.real, turned.imag), -1).type_as(x)


class _KernelRotary(torch.autograd.Function):
    """The Triton kernel of benthic.kernels.rotary; a gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
        from benthic.kernels import rotary as kernels

        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return kernels.rotary(with_contiguous_channels(x), table, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        from benthic.kernels import rotary as kernels

        (grad,) = grad_outputs
        (table,) = ctx.saved_tensors
        return kernels.rotary(with_contiguous_channels(grad), table, ctx.interleaved, inverse=True), None, None


def with_contiguous_channels(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension has a stride (a gradient that is an expanded scalar)."""
    return x if x.stride(-1) == 1 else x.contiguous()

"""Plain torch for benthic.kernels.retile: same names, signatures and layouts. Slow; waits for the device."""

from __future__ import annotations

from torch import Tensor

from benthic.numerics.reference.quantise import dequantise_rows, quantise_columns


def retile_columns(values: Tensor, scales: Tensor, ends: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """quantise_columns, with power-of-two scales, of what values [T, C] with scales [ceil(C / 128), T] stand for; with
    `tokens`, of its rows tokens[0], tokens[1] ..."""
    x = dequantise_rows(values, scales)
    return quantise_columns(x if tokens is None else x[tokens], ends, power_of_two=True)


def take_quantised_rows(values: Tensor, scales: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `tokens` of values [T, C] with scales [ceil(C / 128), T]."""
    return values[tokens], scales[:, tokens]

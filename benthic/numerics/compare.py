"""How closely results must agree: one table, and the comparisons that read it.

A tolerance is stated for what is compared, never for a test. Each is some times the difference observed between
correct implementations, and far below what a real mistake (a wrong epsilon, a transposed pair) makes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from benthic.errors import NumericsError


class Tolerance(NamedTuple):
    """|actual - expected| <= absolute + relative * |expected|, for every element."""

    absolute: float
    relative: float


TOLERANCES: dict[str, Tolerance] = {
    # One operation in float32 against the same mathematics in another order.
    "operation_fp32": Tolerance(2e-5, 2e-5),
    # Its gradient: sums over tokens, hence longer.
    "gradient_fp32": Tolerance(1e-4, 1e-3),
    # A whole network's logits of deviation 1; implementations agree to 3e-6.
    "model_fp32": Tolerance(3e-5, 1e-4),
    # bfloat16 keeps 8 bits: one operation, and a network (two correct ones differ by 0.2 in logits).
    "operation_bf16": Tolerance(1e-2, 2e-2),
    "model_bf16": Tolerance(0.5, 0.1),
}


def largest_excess(
    actual: Shaped[Tensor, "*shape"], expected: Shaped[Tensor, "*shape"], tolerance: Tolerance
) -> tuple[float, tuple[int, ...]]:
    """The largest |actual - expected| as a multiple of what is allowed there, and where; infinite at a NaN."""
    difference = (actual.double() - expected.double()).abs()
    ratio = difference / (tolerance.absolute + tolerance.relative * expected.double().abs())
    # Equal infinities agree.
    ratio = torch.where(actual == expected, 0.0, ratio).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not ratio.numel():
        return 0.0, ()
    place = int(ratio.argmax())
    return float(ratio.flatten()[place]), tuple(int(i) for i in torch.unravel_index(torch.tensor(place), ratio.shape))


def assert_close(actual: Tensor, expected: Tensor, kind: str, name: str = "result") -> None:
    """Raise NumericsError naming the worst element unless `actual` agrees with `expected` as TOLERANCES[kind] asks."""
    if actual.shape != expected.shape:
        raise NumericsError(f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    excess, place = largest_excess(actual, expected, TOLERANCES[kind])
    if excess > 1:
        raise NumericsError(
            f"{name}{list(place)} is {float(actual[place]):.8g}, expected {float(expected[place]):.8g}: "
            f"{excess:.3g} times what {kind} {tuple(TOLERANCES[kind])} allows"
        )

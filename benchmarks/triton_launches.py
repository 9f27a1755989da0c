"""Which Triton kernels a step launched, in order: a trace knows them by bare names such as `_forward` alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

TOUCHED: dict[str, dict[str, int]] = {
    "adamw.adamw": {"master": 2, "exp_avg": 2, "exp_avg_sq": 2},
    "cross_entropy.cross_entropy": {"logits": 2},
    "cross_entropy.multiply": {"x": 0},
    "empty_experts.clear": {"gradient": 0},
}
"""How often a kernel moves an argument, where that is not once: read and written in place, or as a rule not at all."""


@dataclass(frozen=True)
class Launch:
    """`kernel` is its name in a trace, `label` its module and name; bytes of its arguments, FLOPs of FP8 products."""

    kernel: str
    label: str
    bytes: float
    flops: float = 0.0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch of a Triton or Gluon kernel inside the block, by whichever thread; none where there is no Triton."""
    launches: list[Launch] = []
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield launches
        return
    original = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if not warmup:
            launches.append(described(self.fn, dict(zip(self.arg_names, arguments, strict=False)) | named))
        return original(self, *arguments, grid=grid, warmup=warmup, **named)

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def described(function: Any, arguments: Mapping[str, Any]) -> Launch:
    """A launch of `function` with `arguments` by name."""
    name = function.__name__
    label = f"{function.__module__.rpartition('.')[2]}.{name.lstrip('_')}"
    return Launch(name, label, _bytes(label, arguments), _flops(label, arguments))


def _bytes(label: str, arguments: Mapping[str, Any]) -> float:
    """Each tensor once (what a descriptor describes too), or as often as TOUCHED says."""
    sizes: dict[int, float] = {}
    for name, value in arguments.items():
        tensor = value if isinstance(value, torch.Tensor) else getattr(value, "base", None)
        if isinstance(tensor, torch.Tensor):
            times = TOUCHED.get(label, {}).get(name, 1)
            size = float(times * tensor.numel() * tensor.element_size())
            sizes[tensor.data_ptr()] = max(size, sizes.get(tensor.data_ptr(), 0.0))
    return sum(sizes.values())


def _flops(label: str, arguments: Mapping[str, Any]) -> float:
    """Of the two FP8 products, from the descriptors of their operands, which come first."""
    if label not in ("grouped_matmul_fp8.kernel", "grouped_weight_gradient_fp8.kernel"):
        return 0.0
    left, right = [value.shape for value in arguments.values() if hasattr(value, "block_shape")][:2]
    if label.startswith("grouped_matmul"):
        return 2.0 * math.prod(left) * arguments["N"]  # [T, K] times [E N, K], one of E for each row
    return 2.0 * math.prod(left) * right[0]  # [M, P] times [N, P]

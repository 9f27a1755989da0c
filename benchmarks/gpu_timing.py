"""Times on the GPU, and the rates they are held against: what a copy and a matrix product reach in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

import torch

from benthic.errors import ConfigError

FLUSH_BYTES = 256 << 20
HEAD_START_CYCLES = 20_000_000
"""About 10 ms in which the host queues ahead, so that its launches stay out of the times."""


class Stopwatch(Protocol):
    """Seconds of `samples` calls, after one that is not counted."""

    def __call__(self, call: Callable[[], Any], samples: int) -> list[float]: ...


class GpuStopwatch:
    """Seconds between device events around each call, with the L2 cache overwritten before it."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], Any], samples: int) -> list[float]:
        call()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        for begin, end in marks:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


@dataclass(frozen=True)
class Limits:
    """Bytes a second of a large copy, read and written counted; FLOP/s of a large product of random matrices."""

    copy: float
    bf16: float
    fp8: float | None
    """None where the chip has no such unit."""

    def matmul(self, unit: str) -> float:
        """FLOP/s of "bf16" or "fp8"; without such a unit there is no bound."""
        return {"bf16": self.bf16, "fp8": self.fp8}[unit] or math.inf

    def floor(self, moved: int, flops: int, unit: str) -> float:
        """The least seconds that work of `moved` bytes and `flops` FLOPs could take."""
        return max(moved / self.copy, flops / self.matmul(unit))

    def plain(self) -> dict[str, float]:
        """As JSON keeps them."""
        return asdict(self)


def require_gpu(what: str) -> None:
    """Raise ConfigError where there is no GPU to time."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{what} is timed on a GPU, and torch {torch.__version__} finds none here",
            hint="run it on a machine with a CUDA GPU and a CUDA build of torch; benthic doctor says what is missing",
        )


def measured_limits(stopwatch: Stopwatch, samples: int = 9) -> Limits:
    """What this GPU reaches: a copy of 2 GiB, and 8192 x 8192 x 8192 in bf16 and, on Hopper or newer, in FP8."""
    return Limits(_copy_rate(stopwatch, samples), _bf16_rate(stopwatch, samples), _fp8_rate(stopwatch, samples))


def _copy_rate(stopwatch: Stopwatch, samples: int) -> float:
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(stopwatch(lambda: target.copy_(source), samples))


def _bf16_rate(stopwatch: Stopwatch, samples: int) -> float:
    side = 8192
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median(stopwatch(lambda: left @ right.t(), samples))


def _fp8_rate(stopwatch: Stopwatch, samples: int) -> float | None:
    """One scale a tensor and the tensor cores' own accumulation: no scaled or promoted product is quicker."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    side = 8192
    left, right = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * side**3 / median(stopwatch(product, samples))

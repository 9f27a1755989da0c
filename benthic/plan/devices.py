"""Devices as data: peak rates, rates somebody measured, memory, links and an hourly price, each with its source.

Rates are dense (no sparsity) FLOP/s, one multiply-add being 2. Bandwidths are bytes/s; links count one direction of
one GPU. `Device.rate` prefers what was measured on the device; where nobody measured, it takes the measured share of
peak of the device named in `like` and says so, so that every time the planner prints can be traced to a number here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from benthic.errors import ConfigError, did_you_mean

Precision = Literal["fp8", "bf16", "fp32"]
Work = Literal[
    "matmul", "weight_gradient", "grouped", "grouped_weight_gradient", "attention", "attention_backward", "decode"
]
"""Kinds of arithmetic whose rates differ: matrix products (forward and input gradient), their weight gradients,
the same over experts, causal attention over a sequence, its backward, and attention of new tokens over a cache."""

MemoryWork = Literal[
    "elementwise",
    "widen",
    "narrow",
    "accumulate",
    "gather",
    "scatter_add",
    "norm",
    "heads",
    "gated",
    "rows",
    "loss",
    "reduction",
    "optimizer",
    "quantise",
    "retile",
    "quantise_weights",
    "gated_fp8",
]
"""Kinds of memory-bound kernels whose bandwidths differ. torch's: contiguous arrays of one dtype; bfloat16 to float32;
float32 to bfloat16; adding bfloat16 to float32 in place; copying rows by number; adding rows by number (atomic, and
read before they are written). benthic's, both passes: RMS norm; heads of attention turned and joined; SwiGLU; rows to
experts and back; the loss in its logits' place; norms of gradients, and sums; one-pass AdamW; FP8 by rows, down the
tokens from FP8, of weights with their transpose, and SwiGLU that reads and writes it."""
MEMORY_WORKS: tuple[MemoryWork, ...] = get_args(MemoryWork)

GIB = 2**30
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate (FLOP/s or bytes/s) and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or CPU) and its place in a node.

    `memory_bytes` is what torch reports as total memory, rounded down. `measured` maps (work, precision) to a rate
    reached with real shapes. `node_bandwidth` is the link inside a node (NVLink), `network_bandwidth` the one between
    nodes, both as achieved by all-to-all where known. `dollars_per_hour` is an assumption to be overridden.
    `memory_bandwidth` is that of a large copy, `measured_bandwidth` what other kinds of kernels reach, reads and writes
    counted. `launch_seconds` is the least time between two kernels that torch launches one after another.
    The loss holds `logits_at_a_time` (ops/linear_cross_entropy.py). `context_bytes` of its memory go to CUDA itself,
    its libraries and their workspaces, which torch does not count as allocated; `allocator_loss` is the share of the
    peak that the caching allocator may lose between its blocks.
    """

    name: str
    title: str
    memory_bytes: int
    memory_bandwidth: Rate
    peak: dict[Precision, float]
    node_bandwidth: Rate
    network_bandwidth: Rate
    devices_per_node: int
    dollars_per_hour: Rate
    multiprocessors: int
    launch_seconds: Rate
    measured: dict[tuple[Work, Precision], Rate] = field(default_factory=dict)
    measured_bandwidth: dict[MemoryWork, Rate] = field(default_factory=dict)
    like: str | None = None
    logits_at_a_time: int = 1 << 31
    allocator_loss: float = 0.03
    context_bytes: float = 0.7 * GIB

    def rate(self, work: Work, precision: Precision) -> Rate:
        """FLOP/s to expect. Raises ConfigError for a precision the device does not have."""
        if precision not in self.peak:
            raise ConfigError(
                f"device {self.name!r} has no {precision} arithmetic", hint="allowed: " + ", ".join(self.peak)
            )
        if found := self.measured.get((work, precision)):
            return found
        model = DEVICES[self.like] if self.like else self
        if found := model.measured.get((work, precision)):
            share = found.value / model.peak[precision]
            return Rate(share * self.peak[precision], f"{share:.0%} of peak, as on {model.title} ({found.source})")
        return Rate(0.5 * self.peak[precision], "assumed 50% of peak: nobody measured it")

    def bandwidth(self, kind: MemoryWork) -> Rate:
        """Bytes/s to expect of a kind of memory-bound kernel; never more than a copy's, whose rate differs by 2% from
        run to run."""
        if found := self.measured_bandwidth.get(kind):
            return found if found.value <= self.memory_bandwidth.value else self.memory_bandwidth
        model = DEVICES[self.like] if self.like else self
        if found := model.measured_bandwidth.get(kind):
            share = min(1.0, found.value / model.memory_bandwidth.value)
            source = f"assumed: {share:.0%} of a copy, as on {model.title} ({found.source})"
            return Rate(share * self.memory_bandwidth.value, source)
        return Rate(self.memory_bandwidth.value, "assumed: as fast as a copy")


_HOPPER_PEAK: dict[Precision, float] = {"fp8": 1978.9 * TERA, "bf16": 989.4 * TERA, "fp32": 66.9 * TERA}
_GROUPED = "64 experts of 1,536 rows, 2816x2048 and 2048x1408, and 32 of 1,024, 4096x7168 and 7168x2048, mean, H200"
_FP8_PRODUCTS = "benthic's grouped_matmul_fp8, all 124 calls of a profiled step, V2-Lite's widths, torch 2.11, H200"
_FP8_GRADIENTS = "benthic's grouped_weight_gradient_fp8, all 62 calls of the same step, H200"
_H200_MEASURED: dict[tuple[Work, Precision], Rate] = {
    ("matmul", "bf16"): Rate(783 * TERA, "torch 2.11 matmul 8192^3, H200"),
    ("matmul", "fp8"): Rate(1238 * TERA, _FP8_PRODUCTS),
    ("weight_gradient", "bf16"): Rate(783 * TERA, "torch 2.11 matmul 8192^3, H200"),
    ("weight_gradient", "fp8"): Rate(999 * TERA, _FP8_GRADIENTS),
    ("grouped", "bf16"): Rate(675 * TERA, f"torch F.grouped_mm both ways, whole tiles, {_GROUPED}"),
    ("grouped", "fp8"): Rate(1238 * TERA, _FP8_PRODUCTS),
    ("grouped_weight_gradient", "bf16"): Rate(595 * TERA, f"torch F.grouped_mm, {_GROUPED}"),
    ("grouped_weight_gradient", "fp8"): Rate(999 * TERA, _FP8_GRADIENTS),
    ("attention", "bf16"): Rate(605 * TERA, "cuDNN through SDPA, causal 192/128, 4096 positions, 128 heads, H200"),
    ("attention_backward", "bf16"): Rate(360 * TERA, "cuDNN through SDPA, causal 192/128, H200"),
    ("decode", "bf16"): Rate(576 * TERA, "FA3 in MLA mode, 128 sequences, 128 heads, 4096 positions, H200"),
}
# Rates in DeepSeek's own profile (profile-data, train.json): 112 of 132 multiprocessors compute, 20 communicate.
_H800_MEASURED: dict[tuple[Work, Precision], Rate] = {
    ("matmul", "fp8"): Rate(899 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("weight_gradient", "fp8"): Rate(584 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("grouped", "fp8"): Rate(1007 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("grouped_weight_gradient", "fp8"): Rate(584 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("attention", "bf16"): Rate(555 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("attention_backward", "bf16"): Rate(455 * TERA, "DeepSeek's published trace, 112 multiprocessors"),
    ("decode", "bf16"): Rate(660 * TERA, "FlashMLA README, compute-bound"),
}
# Single kernels, each alone, at the shapes of seven training settings of three models: the median.
_KERNEL_RATES = "benchmarks/kernel_rates.py, median of seven settings, torch 2.11, H200"
# Single kernels within a profiled step (benthic bench train --profile): bytes of all calls over the time of all calls.
_PROFILED = "all calls of the kernel in a profiled step of the training benchmark, V2-Lite's widths, torch 2.11, H200"
_H200_BANDWIDTH: dict[MemoryWork, Rate] = {
    "elementwise": Rate(4.27 * TERA, f"product of two bf16 arrays, {_KERNEL_RATES}"),
    "widen": Rate(2.15 * TERA, f"bf16 to float32, {_KERNEL_RATES}"),
    "narrow": Rate(4.32 * TERA, f"float32 to bf16, {_KERNEL_RATES}"),
    "accumulate": Rate(2.83 * TERA, f"a bf16 array added to a float32 one, {_KERNEL_RATES}"),
    "gather": Rate(4.0 * TERA, f"index_select of rows, {_KERNEL_RATES}"),
    "scatter_add": Rate(0.73 * TERA, f"index_add_ of bf16 rows, {_KERNEL_RATES}"),
    "norm": Rate(3.97 * TERA, f"RMS norm with and without residual sum, {_PROFILED}"),
    "heads": Rate(4.03 * TERA, f"latent heads, {_PROFILED}"),
    "gated": Rate(4.19 * TERA, f"SwiGLU, {_PROFILED}"),
    "rows": Rate(3.95 * TERA, f"rows to experts and sums over choices, {_PROFILED}"),
    "loss": Rate(2.43 * TERA, f"cross entropy in place, {_PROFILED}"),
    "reduction": Rate(2.35 * TERA, f"torch._foreach_norm of bf16 gradients, {_PROFILED}"),
    "optimizer": Rate(4.06 * TERA, f"AdamW in one pass, {_PROFILED}"),
    "quantise": Rate(4.15 * TERA, f"quantise_rows, {_PROFILED}"),
    "retile": Rate(2.08 * TERA, f"retile_columns, {_PROFILED}"),
    "quantise_weights": Rate(3.90 * TERA, f"quantise_weights_with_transpose, {_PROFILED}"),
    "gated_fp8": Rate(3.80 * TERA, f"SwiGLU in FP8, {_PROFILED}"),
}
_LAUNCH = Rate(8.2e-6, f"adding 1 to one number 1000 times from Python, {_KERNEL_RATES}")
_ASSUMED_PRICE = "assumption: rental by the hour"

_H200 = Device(
    name="h200",
    title="NVIDIA H200 SXM 141 GB",
    memory_bytes=139 * GIB,
    memory_bandwidth=Rate(4.22 * TERA, "measured copy, read and write counted (datasheet 4.8 TB/s)"),
    peak=_HOPPER_PEAK,
    node_bandwidth=Rate(360 * GIGA, "80% of the datasheet's 450 GB/s a direction"),
    network_bandwidth=Rate(40 * GIGA, "80% of one 400 Gb/s port a GPU"),
    devices_per_node=8,
    dollars_per_hour=Rate(3.0, _ASSUMED_PRICE),
    multiprocessors=132,
    launch_seconds=_LAUNCH,
    measured=_H200_MEASURED,
    measured_bandwidth=_H200_BANDWIDTH,
)
_H100 = replace(
    _H200,
    name="h100",
    title="NVIDIA H100 SXM 80 GB",
    memory_bytes=79 * GIB,
    memory_bandwidth=Rate(2.95 * TERA, "88% of the datasheet's 3.35 TB/s, the share measured on H200"),
    dollars_per_hour=Rate(2.0, _ASSUMED_PRICE),
    launch_seconds=replace(_LAUNCH, source="assumed: as measured beside an H200"),
    measured={},
    measured_bandwidth={},
    like="h200",
)
_H800 = replace(
    _H100,
    name="h800",
    title="NVIDIA H800 SXM 80 GB",
    memory_bandwidth=Rate(3.0 * TERA, "FlashMLA README, memory-bound (datasheet 3.35 TB/s)"),
    node_bandwidth=Rate(160 * GIGA, "DeepSeek-V3 report, section 3.2.2 (datasheet 200 GB/s a direction)"),
    network_bandwidth=Rate(50 * GIGA, "DeepSeek-V3 report, section 3.2.2"),
    dollars_per_hour=Rate(2.0, "DeepSeek-V3 report, table 1"),
    measured=_H800_MEASURED,
)
_A100 = replace(
    _H100,
    name="a100",
    title="NVIDIA A100 SXM 80 GB",
    memory_bandwidth=Rate(1.79 * TERA, "88% of the datasheet's 2.04 TB/s, the share measured on H200"),
    peak={"bf16": 312 * TERA, "fp32": 19.5 * TERA},
    node_bandwidth=Rate(240 * GIGA, "80% of the datasheet's 300 GB/s a direction"),
    network_bandwidth=Rate(20 * GIGA, "80% of one 200 Gb/s port a GPU"),
    dollars_per_hour=Rate(1.2, _ASSUMED_PRICE),
    multiprocessors=108,
)
_B200 = replace(
    _H100,
    name="b200",
    title="NVIDIA B200 SXM 180 GB",
    memory_bytes=178 * GIB,
    memory_bandwidth=Rate(7.04 * TERA, "88% of the datasheet's 8 TB/s, the share measured on H200"),
    peak={"fp8": 4500 * TERA, "bf16": 2250 * TERA, "fp32": 75 * TERA},
    node_bandwidth=Rate(720 * GIGA, "80% of the datasheet's 900 GB/s a direction"),
    dollars_per_hour=Rate(4.5, _ASSUMED_PRICE),
    multiprocessors=148,
)
_CPU = Device(
    name="cpu",
    title="two cores of a server CPU",
    memory_bytes=16 * GIB,
    memory_bandwidth=Rate(20 * GIGA, "assumed: two cores cannot draw more"),
    peak={"bf16": 0.2 * TERA, "fp32": 0.2 * TERA},
    node_bandwidth=Rate(10 * GIGA, "assumed: a copy within main memory"),
    network_bandwidth=Rate(1.25 * GIGA, "assumed: 10 Gb/s Ethernet"),
    devices_per_node=1,
    dollars_per_hour=Rate(0.1, _ASSUMED_PRICE),
    multiprocessors=2,
    launch_seconds=Rate(2e-6, "assumed: calling a torch operation"),
    logits_at_a_time=1 << 20,
    allocator_loss=0.0,
    context_bytes=0.0,
)

DEVICES: dict[str, Device] = {one.name: one for one in (_H800, _H100, _H200, _B200, _A100, _CPU)}


def find_device(name: str) -> Device:
    """The device called `name`, any letter case. Raises ConfigError naming the allowed ones."""
    if name.lower() not in DEVICES:
        raise ConfigError(
            f"unknown device {name!r}; allowed: {', '.join(sorted(DEVICES))}", hint=did_you_mean(name.lower(), DEVICES)
        )
    return DEVICES[name.lower()]

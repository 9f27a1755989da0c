"""Where the time of one training step goes on the GPU: by operation, with the rates that its shapes imply.

Two steps are traced. One with the device's activities alone tells how long the device worked and stood idle; one with
the host's operations and their shapes beside them tells what each kernel was for. Durations of kernels come from the
second, which slows the host but not them.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_timing import Limits
from benchmarks.triton_launches import Launch, recorded

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
ITEM_SIZES = {
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1, "double": 8,
    "long int": 8, "long": 8, "int": 4, "bool": 1, "unsigned char": 1, "signed char": 1,
}  # fmt: skip
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::_scaled_mm_v2"}
GROUPED = {"aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2"}
COPIES = {"aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"}
ELEMENTWISE = {"aten::add", "aten::add_", "aten::sub", "aten::mul", "aten::mul_", "aten::div", "aten::div_"}
FILLS = {"aten::fill_", "aten::zero_"}
Event = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a call is called in the table, and its FLOPs and bytes where its shapes tell them."""

    group: str
    flops: float = 0.0
    bytes: float = 0.0
    unit: str = "bf16"


def profiled(step: Callable[[], Any], limits: Limits | None) -> dict[str, Any]:
    """Trace two steps and account for them."""
    shortest = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    trace(lambda: None, shortest, shapes=False)  # the first one starts the profiler's own machinery
    alone = trace(step, shortest, shapes=False)
    with recorded() as launches:
        named = trace(step, list({ProfilerActivity.CPU, *shortest}), shapes=True)
    rows = operations(named, limits, launches)
    return busy(alone) | {"operations": rows, "limits": limits.plain() if limits else None}


def trace(step: Callable[[], Any], activities: Sequence[ProfilerActivity], shapes: bool) -> list[Event]:
    """The events of one step."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    with profile(activities=list(activities), record_shapes=shapes) as profiler:
        step()
        wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]


def busy(events: Sequence[Event]) -> dict[str, float]:
    """Seconds from the first kernel's start to the last one's end, those in which any ran, the gaps, and counts."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in device_events(events))
    if not spans:
        return {
            "span_seconds": 0.0,
            "busy_seconds": 0.0,
            "idle_seconds": 0.0,
            "longest_gap_seconds": 0.0,
            "launches": 0,
        }
    worked, longest, end = 0.0, 0.0, spans[0][0]
    for start, stop in spans:
        longest = max(longest, start - end)
        worked += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - spans[0][0]
    return {
        "span_seconds": span / 1e6, "busy_seconds": worked / 1e6, "idle_seconds": (span - worked) / 1e6,
        "longest_gap_seconds": longest / 1e6, "launches": len(spans),
    }  # fmt: skip


def device_events(events: Sequence[Event]) -> Iterator[Event]:
    """What ran on the device: kernels, copies and fills."""
    return (event for event in events if event.get("cat") in DEVICE_CATEGORIES and event.get("ph") == "X")


def operations(events: Sequence[Event], limits: Limits | None, launches: Sequence[Launch] = ()) -> list[dict[str, Any]]:
    """Rows, longest first: group, calls, seconds, share of the device's time, and rates where known.

    `launches` are the Triton kernels that the traced step launched, in order.
    """
    hosts = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    ours = matched(events, launches)
    rows: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, int]] = set()
    for event in device_events(events):
        number = event.get("args", {}).get("External id")
        launch = ours.get(id(event))
        work = _launched(launch) if launch is not None else work_of(event["name"], hosts.get(number))
        row = rows.setdefault(work.group, {"group": work.group, "calls": 0, "seconds": 0.0, "flops": 0.0, "bytes": 0.0})
        row["seconds"] += event["dur"] / 1e6
        row["unit"] = work.unit
        if launch is None and (work.flops or work.bytes) and (work.group, number) in seen:
            continue  # several kernels may serve one call; its work counts once
        seen.add((work.group, number))
        row["calls"] += 1
        row["flops"] += work.flops
        row["bytes"] += work.bytes
    total = sum(row["seconds"] for row in rows.values())
    return sorted((_rated(row, total, limits) for row in rows.values()), key=lambda row: -row["seconds"])


def matched(events: Sequence[Event], launches: Sequence[Launch]) -> dict[int, Launch]:
    """Launch by `id` of its event: the n-th launch of a name is the n-th event of that name in the host's order.

    A name whose numbers differ is left out, and its kernels go by their bare name.
    """
    found: dict[int, Launch] = {}
    for name in {launch.kernel for launch in launches}:
        mine = [launch for launch in launches if launch.kernel == name]
        ran = [event for event in device_events(events) if event["name"] == name]
        if len(mine) == len(ran):
            ran.sort(key=lambda event: event["args"].get("correlation", 0))
            found |= {id(event): launch for event, launch in zip(ran, mine, strict=True)}
    return found


def _launched(launch: Launch) -> Work:
    return Work(launch.label, launch.flops, launch.bytes, _unit(bool(launch.flops)))


def _rated(row: dict[str, Any], total: float, limits: Limits | None) -> dict[str, Any]:
    row["share"] = row["seconds"] / total if total else 0.0
    if row["flops"]:
        row["tflops"] = row["flops"] / row["seconds"] / 1e12
    elif row["bytes"]:
        row["gigabytes_per_second"] = row["bytes"] / row["seconds"] / 1e9
    if limits and (row["flops"] or row["bytes"]):
        row["share_of_limit"] = limits.floor(row["bytes"], row["flops"], row["unit"]) / row["seconds"]
    return row


def work_of(kernel: str, host: Event | None) -> Work:
    """What a kernel was for: its host operation where torch has one, else its own name (Triton's are plain words)."""
    if host is None:
        return Work(kernel_name(kernel))
    name, arguments = host["name"], host.get("args", {})
    # A list of tensors has a list of shapes and no type; it counts as unknown.
    given = [shape for shape in arguments.get("Input Dims", []) if isinstance(shape, list)]
    shapes = [shape if all(isinstance(size, int) for size in shape) else [] for shape in given]
    types = arguments.get("Input type", [])
    if name in MATMULS and len(operands := [s for s in shapes if len(s) in (2, 3)]) >= 2:
        return _matmul(name, operands[-2:] if name == "aten::addmm" else operands[:2])
    if name in GROUPED and len(shapes) >= 2:
        return _grouped(name, shapes[0], shapes[1])
    if "scaled_dot_product" in name and "attention" in name:
        return _attention(name, shapes)
    if name in COPIES:
        return Work(f"copy: {_kinds(types)}", bytes=_copied(shapes, types))
    if name.startswith("aten::") and not _is_triton(kernel):
        return Work(name.removeprefix("aten::"), bytes=_elementwise(name, shapes, types))
    return Work(kernel_name(kernel))


def _matmul(name: str, operands: list[list[int]]) -> Work:
    left, right = operands
    batch = left[0] if len(left) == 3 else 1
    rows, inner, columns = left[-2], left[-1], right[-1]
    shape = f"{rows} x {inner} x {columns}" if batch == 1 else f"{batch} x {rows} x {inner} x {columns}"
    fp8 = "scaled" in name
    size = 1 if fp8 else 2
    moved = batch * (size * (rows * inner + inner * columns) + 2 * rows * columns)
    return Work(f"matmul{' fp8' if fp8 else ''} {shape}", 2.0 * batch * rows * inner * columns, moved, _unit(fp8))


def _unit(fp8: bool) -> str:
    return "fp8" if fp8 else "bf16"


def _grouped(name: str, left: list[int], right: list[int]) -> Work:
    """Rows by expert times weights [E, K, N], or two sets of rows times each other, expert by expert."""
    fp8 = "scaled" in name
    rows, inner, columns = left[-2], left[-1], right[-1]
    what = f"grouped matmul{' fp8' if fp8 else ''}"
    shape = f"{rows} x {inner} x {columns}"
    moved = (1 if fp8 else 2) * (math.prod(left) + math.prod(right))
    flops = 2.0 * rows * inner * columns
    if len(right) == 3:
        return Work(f"{what} {shape}, {right[0]} experts", flops, moved + 2 * rows * columns, _unit(fp8))
    return Work(f"{what} {shape}, weight gradient", flops, moved, _unit(fp8))


def _attention(name: str, shapes: list[list[int]]) -> Work:
    """Causal: half of S x S. Backward has five products, three of the query's width and two of the value's."""
    tensors = [shape for shape in shapes if len(shape) == 4]
    backward = "backward" in name
    what = f"attention {'backward' if backward else 'forward'}"
    offset = 1 if backward else 0  # the backward is handed the output's gradient first
    if len(tensors) < 3 + offset:
        return Work(what)
    query, _, value = tensors[offset : offset + 3]
    sequences, heads, length, width = query
    products = 3 * width + 2 * value[-1] if backward else width + value[-1]
    return Work(f"{what} {heads} heads {width}/{value[-1]}", float(sequences * heads * length**2 * products))


def _copied(shapes: list[list[int]], types: Sequence[str]) -> float:
    """copy_(target, source): written and read once each; other copies have one input of the same size."""
    if not shapes or not shapes[0] or not all(types[:1]):
        return 0.0
    count = math.prod(shapes[0])
    sizes = [ITEM_SIZES.get(kind, 0) for kind in types[:2] if kind]
    if len(sizes) == 2 and all(sizes):
        return float(count * sum(sizes))
    return float(2 * count * sizes[0])


def _elementwise(name: str, shapes: list[list[int]], types: Sequence[str]) -> float:
    """Each operand read once and a result as large as the largest written; a fill only writes. 0 where not known."""
    pairs = zip(shapes, types, strict=False)
    sizes = [math.prod(shape) * ITEM_SIZES.get(kind, 0) for shape, kind in pairs if shape and kind]
    if not sizes or not (name in ELEMENTWISE or name in FILLS):
        return 0.0
    return float(max(sizes) if name in FILLS else sum(sizes) + max(sizes))


def _kinds(types: Sequence[str]) -> str:
    short = [re.sub(r"^c10::", "", kind) for kind in types[:2] if kind]
    return " from ".join(dict.fromkeys(short)) if short else "unknown"


def _is_triton(kernel: str) -> bool:
    """Triton's kernels are named by plain words; those of torch and its libraries by C++ signatures or known starts."""
    library = ("nvjet", "cudnn", "cublas", "cutlass", "sm80", "sm90", "ampere", "void", "Mem", "gemm")
    return re.fullmatch(r"\w+", kernel) is not None and not kernel.startswith(library)


def kernel_name(kernel: str) -> str:
    """A kernel's name without template arguments and parameter list."""
    bare = re.sub(r"^void\s+", "", kernel)
    return re.split(r"[<(]", bare)[0].strip() or kernel[:60]


def table(result: dict[str, Any], rows: int = 48) -> str:
    """A profile in at most 60 lines."""
    median = result["step_seconds"]["median"]
    lines = [
        f"step {median * 1e3:.1f} ms (median, not profiled); profiled: {result['span_seconds'] * 1e3:.1f} ms from the "
        f"first to the last kernel, {result['idle_seconds'] * 1e3:.1f} ms idle, longest gap "
        f"{result['longest_gap_seconds'] * 1e6:.0f} us, {result['launches']} launches",
        f"{'operation':<58}{'calls':>6}{'ms':>9}{'share':>7}{'rate':>15}{'of limit':>10}",
    ]
    shown, rest = result["operations"][:rows], result["operations"][rows:]
    for row in shown:
        rate = ""
        if "tflops" in row:
            rate = f"{row['tflops']:.0f} TFLOP/s"
        elif "gigabytes_per_second" in row:
            rate = f"{row['gigabytes_per_second']:.0f} GB/s"
        limit = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
        lines.append(
            f"{row['group'][:57]:<58}{row['calls']:>6}{row['seconds'] * 1e3:>9.2f}{row['share']:>7.1%}"
            f"{rate:>15}{limit:>10}"
        )
    if rest:
        seconds, share = sum(row["seconds"] for row in rest), sum(row["share"] for row in rest)
        lines.append(f"{f'{len(rest)} more':<58}{sum(r['calls'] for r in rest):>6}{seconds * 1e3:>9.2f}{share:>7.1%}")
    lines += [f"{kind:<58}{'':>6}{seconds * 1e3:>9.2f}" for kind, seconds in kinds(result["operations"]).items()]
    return "\n".join(lines) + "\n"


def kinds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind: products, attention, copies, and the rest."""
    starts = {"matmul": "all matmuls", "grouped": "all grouped matmuls", "attention": "all attention", "copy": "copies"}
    found = dict.fromkeys((*starts.values(), "all else"), 0.0)
    for row in rows:
        found[starts.get(re.split(r"[ _:]", row["group"])[0], "all else")] += row["seconds"]
    return found

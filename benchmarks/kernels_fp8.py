"""FP8 kernels beside their peers on one Hopper GPU: `python benchmarks/kernels_fp8.py --out FILE.json`.

Every subject is first checked, in this run and on fresh random data, against float32 products of what it was given; one
that is wrong is named and never timed. Then the subjects of a case take turns in rounds, with the L2 cache flushed
before each sample. A row shows the median of all samples and the slowest and fastest round's median.

`--peers DIR` holds DeepGEMM as the vLLM 0.26.0 wheel ships it (vllm/third_party/deep_gemm); without it those rows are
left out. `--only TEXT` picks cases by name; `--check` checks and compiles without timing.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from benthic.files import write_atomic
from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8
from benthic.kernels.grouped_weight_gradient_fp8 import grouped_weight_gradient_fp8
from benthic.kernels.quantise import (
    quantise_columns,
    quantise_rows,
    quantise_weights,
    quantise_weights_with_transpose,
)
from benthic.numerics.reference import quantise as reference

ROUNDS, SAMPLES = 3, 7
BANDWIDTH = 4.22e12
"""Bytes a second, read and written, of a large copy on an H200: what quantisation is held against."""
SHAPES = [(4096, 7168), (7168, 2048)]
FORWARD_GROUPS = [(4, 8192), (8, 4096), (32, 1024)]
GRADIENT_GROUPS = [(4, 8192), (16, 2048), (32, 1024), (64, 512)]


@dataclass
class Case:
    name: str
    subjects: dict[str, Callable[[], Tensor]]
    error: Callable[[Tensor], float]
    tolerances: dict[str, float] = field(default_factory=dict)
    flop: float = 0
    bytes: float = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--commit", default=machine.commit(), help="of the code that is measured")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    deep_gemm = load_deep_gemm(options.peers)
    rows, wrong = [], 0
    for make in [case for case in all_cases(deep_gemm) if options.only in case[0]]:
        found, mistakes = run(make[1](), timed=not options.check)
        rows += found
        wrong += mistakes
        torch.cuda.empty_cache()
    if options.out and not options.check:
        where = machine.describe(("torch", "triton", "numpy")) | {
            "command": "python " + " ".join(sys.argv),
            "commit": options.commit,
            "gpu": torch.cuda.get_device_name(),
        }
        document = {
            "name": "kernels_fp8", "machine": where, "rounds": ROUNDS, "samples_a_round": SAMPLES, "rows": rows,
        }  # fmt: skip
        write_atomic(options.out, json.dumps(document, indent=1))
    return 1 if wrong else 0


def load_deep_gemm(folder: Path | None):
    """The module, or None with the reason on stderr: it builds its kernels with nvcc at the first call."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder / "vllm" / "third_party"))
    os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    try:
        import deep_gemm
    except (ImportError, OSError, RuntimeError) as error:
        print(f"no DeepGEMM: {error}", file=sys.stderr)
        return None
    return deep_gemm


def all_cases(deep_gemm) -> Iterator[tuple[str, Callable[[], Case]]]:
    for tokens in (4096, 32768):
        yield f"quantise rows {tokens}x7168", lambda tokens=tokens: rows_case(tokens)
        yield f"quantise columns {tokens}x7168", lambda tokens=tokens: columns_case(tokens)
    for experts in (1, 8):
        yield f"quantise weights {experts}x4096x7168", lambda experts=experts: weights_case(experts, False)
        yield f"quantise weights and transpose {experts}x4096x7168", lambda experts=experts: weights_case(experts, True)
    for shape in SHAPES:
        yield f"dense 32768 {shape[0]}x{shape[1]}", lambda shape=shape: dense_case(32768, *shape)
    for ragged in (False, True):
        for experts, tokens in FORWARD_GROUPS:
            for shape in SHAPES:
                name = f"forward {'ragged' if ragged else 'even'} {experts}x{tokens} {shape[0]}x{shape[1]}"
                arguments = (name, experts, tokens, *shape, ragged, deep_gemm)
                yield name, lambda arguments=arguments: forward_case(*arguments)
        for experts, tokens in GRADIENT_GROUPS:
            for shape in SHAPES:
                name = f"weight gradient {'ragged' if ragged else 'even'} {experts}x{tokens} {shape[0]}x{shape[1]}"
                arguments = (name, experts, tokens, *shape, ragged, deep_gemm)
                yield name, lambda arguments=arguments: gradient_case(*arguments)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def rows_case(tokens: int) -> Case:
    x = random(tokens, 7168)

    def error(result):
        values, scales = result
        return relative(reference.dequantise_rows(values[:512], scales[:, :512]), x[:512])

    subjects = {"benthic": lambda: quantise_rows(x), "copy (ceiling)": lambda: x.clone()}
    ours = Case(f"quantise rows {tokens}x7168", subjects, error, {"benthic": 0.03}, bytes=x.numel() * (3 + 4 / 128))
    return ours


def columns_case(tokens: int) -> Case:
    x = random(tokens, 7168)
    ends = torch.arange(1, 9, device="cuda", dtype=torch.int32) * (tokens // 8)

    def error(result):
        values, scales = result
        first = tokens // 8 // 128  # blocks of the first group
        return relative(reference.dequantise_rows(values[:, : first * 128], scales[:first]), x[: first * 128].T)

    subjects = {"benthic": lambda: quantise_columns(x, ends)}
    name = f"quantise columns {tokens}x7168"
    return Case(name, subjects, error, {"benthic": 0.03}, bytes=x.numel() * (3 + 4 / 128))


def weights_case(experts: int, transpose: bool) -> Case:
    weight = random(experts, 4096, 7168)

    def error(result):
        expected = weight[:1].transpose(1, 2) if transpose else weight[:1]
        return relative(reference.dequantise_weights(result[-2][:1], result[-1][:1]), expected)

    call = quantise_weights_with_transpose if transpose else quantise_weights
    name = f"quantise weights {'and transpose ' if transpose else ''}{experts}x4096x7168"
    return Case(
        name,
        {"benthic": lambda: call(weight)},
        error,
        {"benthic": 0.03},
        bytes=weight.numel() * (4 if transpose else 3),
    )


def sizes(experts: int, tokens: int, ragged: bool) -> list[int]:
    """Even groups, or lengths between 0.7 and 1.3 times `tokens` that no block divides."""
    if not ragged:
        return [tokens] * experts
    spread = torch.rand(experts, generator=torch.Generator().manual_seed(experts)) * 0.6 + 0.7
    return [int(tokens * factor) | 1 for factor in spread.tolist()]


def forward_case(name: str, experts: int, tokens: int, columns: int, depth: int, ragged: bool, deep_gemm) -> Case:
    lengths = sizes(experts, tokens, ragged)
    ends = torch.tensor(lengths, device="cuda").cumsum(0).int()
    x, weight = random(sum(lengths), depth), random(experts, columns, depth)
    values, scales = quantise_rows(x)
    w, w_scales = quantise_weights(weight)
    sampled, expected, start = [], [], 0
    for expert, length in enumerate(lengths):  # the first and last 32 rows of every group
        rows = torch.cat([torch.arange(start, start + 32), torch.arange(start + length - 32, start + length)]).cuda()
        left = reference.dequantise_rows(values[rows], scales[:, rows])
        sampled.append(rows)
        expected.append(left @ reference.dequantise_weights(w[expert, None], w_scales[expert, None])[0].T)
        start += length
    sampled, expected = torch.cat(sampled), torch.cat(expected)
    subjects = {
        "benthic fp8": lambda: grouped_matmul_fp8(values, scales, w, w_scales, ends),
        "torch grouped_mm bf16": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
    }
    if deep_gemm and not ragged:  # it needs groups padded to a multiple of its tile
        group_of_row = torch.repeat_interleave(torch.arange(experts), torch.tensor(lengths)).int().cuda()
        into = x.new_empty(len(x), columns)
        subjects["DeepGEMM fp8"] = lambda: (
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous((values, scales.T), (w, w_scales), into, group_of_row),
            into,
        )[1]
    return Case(
        name, subjects, lambda result: relative(result[sampled], expected),
        {"torch grouped_mm bf16": 0.06},
        flop=2 * len(x) * columns * depth,
    )  # fmt: skip


def dense_case(rows: int, columns: int, depth: int) -> Case:
    """As many operations as a grouped product, in one piece, by cuBLAS: what grouping costs."""
    values, scales = quantise_rows(random(rows, depth))
    weight, weight_scales = quantise_weights(random(1, columns, depth))
    expected = reference.dequantise_rows(values[-64:], scales[:, -64:])
    expected = expected @ reference.dequantise_weights(weight, weight_scales)[0].T
    kind = F.ScalingType
    subjects = {
        "torch scaled_mm fp8": lambda: F.scaled_mm(
            values, weight[0].T, scales.T, kind.BlockWise1x128, weight_scales[0].T, kind.BlockWise128x128,
            output_dtype=torch.bfloat16,
        ),
    }  # fmt: skip
    name = f"dense {rows} {columns}x{depth}"
    return Case(name, subjects, lambda result: relative(result[-64:], expected), flop=2 * rows * columns * depth)


def gradient_case(name: str, experts: int, tokens: int, rows: int, columns: int, ragged: bool, deep_gemm) -> Case:
    lengths = sizes(experts, tokens, ragged)
    ends = torch.tensor(lengths, device="cuda").cumsum(0).int()
    gradient, inputs = random(sum(lengths), rows), random(sum(lengths), columns)
    a, b = quantise_columns(gradient, ends), quantise_columns(inputs, ends)
    blocks = reference.group_blocks(ends)
    sampled = torch.cat([torch.arange(128), torch.arange(rows - 128, rows)]).cuda()
    expected = torch.stack([
        reference.dequantise_rows(a[0][sampled][:, p], a[1][q][:, sampled])
        @ reference.dequantise_rows(b[0][:, p], b[1][q]).T
        for first, count, _ in blocks
        for p, q in [(slice(first * 128, (first + count) * 128), slice(first, first + count))]
    ])  # fmt: skip
    subjects = {
        "benthic fp8, fp32 result": lambda: grouped_weight_gradient_fp8(*a, *b, ends),
        "benthic fp8, bf16 result": lambda: grouped_weight_gradient_fp8(*a, *b, ends, torch.bfloat16),
        "torch grouped_mm bf16": lambda: F.grouped_mm(gradient.T, inputs, offs=ends),
    }
    if deep_gemm and not ragged:
        subjects["DeepGEMM fp8, fp32 result"] = deep_gemm_gradient(deep_gemm, gradient, inputs, lengths)
    return Case(
        name, subjects, lambda result: relative(result[:, sampled], expected),
        {"torch grouped_mm bf16": 0.06, "DeepGEMM fp8, fp32 result": 0.06}, flop=2 * sum(lengths) * rows * columns,
    )  # fmt: skip


def deep_gemm_gradient(deep_gemm, gradient: Tensor, inputs: Tensor, lengths: list[int]) -> Callable[[], Tensor]:
    from deep_gemm.utils.math import per_channel_cast_to_fp8

    def flat(x):
        values, scales = per_channel_cast_to_fp8(x, False)
        return torch.cat([part.T.reshape(-1) for part in values.split(lengths)]), scales.T

    left, right = flat(gradient), flat(inputs)
    on_device = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    base = torch.zeros(len(lengths), gradient.shape[1], inputs.shape[1], device="cuda")
    into = torch.empty_like(base)

    def call():
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, into, lengths, on_device, base)
        return into

    return call


def run(case: Case, timed: bool) -> tuple[list[dict], int]:
    """The rows of a case, and how many subjects were wrong."""
    right, wrong = {}, 0
    for name, call in case.subjects.items():
        if "ceiling" in name:
            right[name] = (call, 0.0)
            continue
        try:
            error = case.error(call())
        except Exception as failure:  # a peer that cannot run here is reported, not hidden
            print(f"{case.name:52s} {name:42s} cannot run: {str(failure)[:120]}", flush=True)
            continue
        if error <= case.tolerances.get(name, 3e-3):
            right[name] = (call, error)
        else:
            wrong += 1
            print(f"{case.name:52s} {name:42s} WRONG: relative error {error:.2e}; not timed", flush=True)
    if not timed:
        print(f"{case.name:52s} checked: {', '.join(f'{n} {e:.1e}' for n, (_, e) in right.items())}", flush=True)
        return [], wrong
    rounds = {name: [] for name in right}
    for _ in range(ROUNDS):
        for name, (call, _) in right.items():
            rounds[name].append(samples(call))
    rows = []
    for name, taken in rounds.items():
        middle = median(time for one in taken for time in one)
        of_rounds = sorted(median(one) for one in taken)
        row = {
            "case": case.name, "subject": name, "seconds": middle, "fastest_round": of_rounds[0],
            "slowest_round": of_rounds[-1], "relative_error": right[name][1],
        }  # fmt: skip
        if case.flop:
            row["tflops"] = case.flop / middle / 1e12
            speed = f"{row['tflops']:7.0f} TFLOP/s"
        else:
            moved = 4 * case.bytes / (3 + 4 / 128) if "copy" in name else case.bytes
            row["gigabytes_a_second"] = moved / middle / 1e9
            row["share_of_copy_rate"] = moved / middle / BANDWIDTH
            speed = f"{row['gigabytes_a_second']:7.0f} GB/s {row['share_of_copy_rate']:4.0%}"
        spread = f"{of_rounds[0] * 1e6:.1f} to {of_rounds[-1] * 1e6:.1f}"
        print(f"{case.name:52s} {name:42s} {middle * 1e6:9.1f} us ({spread:>20s}) {speed}", flush=True)
        rows.append(row)
    return rows, wrong


_flush: list[Tensor] = []


def samples(call: Callable[[], Tensor]) -> list[float]:
    """Seconds of SAMPLES calls, each after 256 MiB have been written over the L2 cache."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(SAMPLES)]
    torch.cuda.synchronize()
    torch.cuda._sleep(5_000_000)  # the host queues ahead, so that its launches stay out of the times
    for begin, end in events:
        _flush[0].zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


if __name__ == "__main__":
    sys.exit(main())

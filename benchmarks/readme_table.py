"""Tables of measured numbers, from benchmarks/results/*.json: all of them in docs/benchmarks.md, a few in the README.

python benchmarks/readme_table.py            prints all rows
python benchmarks/readme_table.py --write    puts them between the markers of both files
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results -->", "<!-- /results -->"
HEADLINES: dict[str, tuple[str, ...]] = {
    "train_gpu": (
        "training, lite, bf16, float32 moments, beside torchtitan 0.2.2 mixed precision",
        "training, lite, bf16, bfloat16 moments, beside torchtitan 0.2.2 all bf16",
        "training, lite, float8",
        "training, v3, float8",
        "planned memory of training, lite, bf16, float32 moments",
        "planned memory of training, v3, float8",
    ),
    "decode": (
        "decoding, batch 1,",
        "decoding, batch 32,",
        "decoding, batch 256,",
        "prompts, batch 32,",
        "start-up of the engine",
    ),
    "decode_drafts": ("decoding, batch 1,", "decoding, batch 256,"),
    "fp8_loss": ("loss after",),
    "train_cpu_tiny": ("training step, tiny", "greedy decoding with a cache, tiny"),
    "kernels_fp8": (
        "forward 8x4096 4096x7168",
        "weight gradient 16x2048 4096x7168",
        "weight gradient 32x1024 4096x7168",
        "quantise rows 32768x7168",
    ),
}
"""Rows that the README shows: of which result, and how they begin. A result that is not there yet shows none."""
HEADER = ["| what | benthic | beside it | ratio | measured on | commit |", "|---|---|---|---|---|---|"]


def rows(path: Path) -> Iterator[str]:
    """Markdown rows of one result."""
    result = json.loads(path.read_text())
    yield from ROWS[result["name"]](result)


def results() -> list[Path]:
    """Every result's file."""
    return sorted(RESULTS.glob("*.json"))


def _train(result: dict[str, Any]) -> Iterator[str]:
    work, machine = result["workload"], result["machine"]
    processor = machine["processor"].split(" (")[0]
    where = f"{machine['cores']} CPU cores ({processor}), torch {machine['versions']['torch']}"
    peer = f"transformers {machine['versions']['transformers']}"
    parts = (
        ("training", f"training step, {work['preset']}, {work['batch']} x {work['sequence_length']}, {work['dtype']}"),
        ("decoding", f"greedy decoding with a cache, {work['preset']}, batch 1, {work['dtype']}"),
    )
    for part, what in parts:
        speed, ratio = result[part]["speed"], result[part]["times_transformers"]
        yield _row(
            what,
            f"{speed['benthic']['median']:,.0f} tokens/s",
            f"{peer}: {speed['transformers']['median']:,.0f}",
            f"{ratio['median']:.2f} ({ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f})",
            where,
            machine["commit"],
        )


def _plan_vs_measured(result: dict[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    where = f"{machine['gpu']}, torch {machine['versions']['torch']}"
    for row in result["rows"]:
        if "measured" not in row:
            continue
        memory, seconds = row["measured"]["allocated_bytes"] / 2**30, row["measured"]["step_seconds"]["median"]
        yield _row(
            f"planned memory of a training step: {row['setting']}",
            f"{row['predicted_bytes'] / 2**30:.2f} GiB planned",
            f"{memory:.2f} GiB measured",
            f"{row['memory_ratio']:.3f}",
            where,
            machine["commit"],
        )
        yield _row(
            f"planned time of a training step: {row['setting']}",
            f"{row['predicted_seconds_from_device_file'] * 1e3:.0f} ms planned",
            f"{seconds * 1e3:.0f} ms measured",
            f"{row['time_ratio_from_device_file']:.3f}",
            where,
            machine["commit"],
        )


def _kernels_fp8(result: dict[str, Any]) -> Iterator[str]:
    """Groups of even length, each beside its fastest peer; quantisation of large tensors beside a copy."""
    machine = result["machine"]
    where = f"{machine['gpu']}, torch {machine['versions']['torch']}, Triton {machine['versions']['triton']}"
    cases: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["subject"]] = row
    for case, subjects in cases.items():
        ours = min((row for name, row in subjects.items() if "benthic" in name), key=_seconds, default=None)
        peer = min((row for name, row in subjects.items() if "benthic" not in name), key=_seconds, default=None)
        if ours is not None and peer is not None and " even " in case:
            what = f"{case.replace(' even', '')} ({ours['subject'].removeprefix('benthic ')})"
            speeds = f"{ours['tflops']:,.0f} TFLOP/s", f"{peer['subject']}: {peer['tflops']:,.0f}"
            yield _row(what, *speeds, f"{peer['seconds'] / ours['seconds']:.2f}", where, machine["commit"])
        elif ours is not None and ours.get("share_of_copy_rate") and (" 8x" in case or " 32768" in case):
            speed = f"{ours['gigabytes_a_second'] / 1e3:.2f} TB/s"
            yield _row(case, speed, "a copy: 4.22", f"{ours['share_of_copy_rate']:.2f}", where, machine["commit"])


def _seconds(row: dict[str, Any]) -> float:
    return row["seconds"]


def _kernels(result: dict[str, Any]) -> Iterator[str]:
    """Each case beside its fastest peer, or beside the chip's limit where it has none."""
    machine = result["machine"]
    where = f"{machine['gpu']}, torch {machine['versions']['torch']}, Triton {machine['versions']['triton']}"
    for case in result["cases"]:
        ours = case.get("subjects", {}).get("benthic", {})
        if "seconds" not in ours:
            continue
        shown = f"{_rate(case, ours['seconds'])} ({ours['share_of_limit']:.0%} of the limit)"
        if "best_peer" in case:
            peer = case["best_peer"]
            beside = f"{peer}: {_rate(case, case['subjects'][peer]['seconds'])}"
            ratio = f"{case['times_best_peer']:.2f}"
        else:
            beside, ratio = f"limit: {_rate(case, case['floor_seconds'])}", f"{ours['share_of_limit']:.2f}"
        yield _row(f"{case['operation']} {case['shape']}", shown, beside, ratio, where, machine["commit"])


def _rate(case: dict[str, Any], seconds: float) -> str:
    if case["flops"]:
        return f"{case['flops'] / seconds / 1e12:,.0f} TFLOP/s"
    return f"{case['bytes'] / seconds / 1e12:.2f} TB/s"


def _train_gpu(result: dict[str, Any]) -> Iterator[str]:
    """Arms beside peers that keep the same states, FP8 beside bf16, and memory beside torchtitan's."""
    arms = {name: arm for name, arm in result["arms"].items() if "error" not in arm}
    for ours, peer in TRAINING_PAIRS:
        if ours not in arms or peer not in arms:
            continue
        arm, other = arms[ours], arms[peer]
        what = f"training, {_arm(arm)}, beside {_arm_beside(other)}"
        speed = f"{arm['tokens_per_second']:,.0f} tokens/s, {arm['tflops']:.0f} TFLOP/s"
        ratio = f"{arm['tokens_per_second'] / other['tokens_per_second']:.2f}"
        where = f"{arm['machine']['gpu']}, torch {arm['machine']['versions']['torch']}"
        yield _row(what, speed, f"{other['tokens_per_second']:,.0f}", ratio, where, arm["machine"]["commit"])
        if other["arm"]["trainer"] == "torchtitan":
            memory, theirs = (one["memory"]["reserved_gib"] for one in (arm, other))
            what = f"memory reserved while training, {_arm(arm)}, beside {_arm_beside(other)}"
            cells = f"{memory:.1f} GiB", f"{theirs:.1f} GiB", f"{memory / theirs:.2f}"
            yield _row(what, *cells, where, arm["machine"]["commit"])
    for arm in arms.values():
        memory = arm.get("memory", {})
        if "planned_gib" in memory:
            planned, peak = memory["planned_gib"], memory["allocated_gib"]
            where = f"{arm['machine']['gpu']}, torch {arm['machine']['versions']['torch']}"
            cells = f"{planned:.2f} GiB planned", f"{peak:.2f} GiB at the peak", f"{planned / peak:.3f}"
            yield _row(f"planned memory of training, {_arm(arm)}", *cells, where, arm["machine"]["commit"])


def _decode(result: dict[str, Any]) -> Iterator[str]:
    """Tokens a second of every batch size, and prompts', beside the peer's on the same folder."""
    work, machine, peer = result["workload"], result["machine"], result.get("peer")
    where = f"{machine['gpu']}, torch {machine['versions']['torch']}"
    kept = "".join(f", {part} in FP8" for part in ("weights", "cache") if work[part] == "float8")
    what = f"{result['billion_parameters']:.1f} B, {work['dtype'].replace('bfloat16', 'bf16')}{kept}"
    if work["draft_tokens"]:
        right = "" if work["acceptance"] is None else f", {work['acceptance']:.0%} of them right"
        what += f", {work['draft_tokens']} draft{'s' if work['draft_tokens'] > 1 else ''}{right}"
    theirs = {row["batch"]: row for row in peer["results"]} if peer else {}
    beside = f"{peer['name']} {peer['version']}: " if peer else ""
    for name, field in (("decoding", "tokens_per_second"), ("prompts", "prompt_tokens_per_second")):
        for row in result["results"]:
            other, speed = theirs.get(row["batch"]), f"{row[field]:,.0f} tokens/s"
            if field == "tokens_per_second":
                speed += f" ({row['ms_per_token']:.2f} ms)"
            cells = (f"{beside}{other[field]:,.0f}", f"{row[field] / other[field]:.2f}") if other else ("", "")
            yield _row(f"{name}, batch {row['batch']}, {what}", speed, *cells, where, machine["commit"])
    seconds, other = result["startup_seconds"], peer["startup_seconds"] if peer else None
    cells = (f"{beside}{other:.0f} s", f"{other / seconds:.2f}") if other else ("", "")
    yield _row(f"start-up of the engine, {what}", f"{seconds:.1f} s", *cells, where, machine["commit"])


TRAINING_PAIRS = (
    ("bf16", "torchtitan"),
    ("bf16", "torchtitan-bf16"),
    ("bf16-moments", "torchtitan-bf16"),
    ("bf16-moments", "torchtitan-sdpa-bf16"),
    ("bf16", "torchtitan-sdpa"),
    ("bf16-moments", "transformers"),
    ("bf16", "bf16-compiled"),
    ("float8", "bf16-moments"),
    ("v3-float8", "v3-bf16"),
    ("v3-bf16", "v3-torchtitan-bf16"),
)
"""Arms of the training benchmark, and those that stand beside them."""


def _arm(row: dict[str, Any]) -> str:
    arm = row["arm"]
    compute = {"bfloat16": "bf16"}.get(arm["compute"], arm["compute"])
    return f"{arm['model']}, {compute}, {arm['states']} moments"


def _arm_beside(row: dict[str, Any]) -> str:
    arm = row["arm"]
    if arm["trainer"] == "benthic":
        return f"its own bf16{', layers compiled' if arm['compiled'] else ''}"
    states = "all bf16" if arm["states"] == "bfloat16" else "mixed precision"
    attention = ", SDPA" if arm["trainer"] == "torchtitan" and arm["attention"] == "sdpa" else ""
    return f"{arm['trainer']} {row['version']} {states}{attention}"


def _fp8_loss(result: dict[str, Any]) -> Iterator[str]:
    """The smoothed loss of each FP8 run beside bf16's: the mean difference over the last tenth of the updates."""
    found = result["summary"]
    names = {"float8": "in FP8", "blocks": "in FP8, gradients by 128 x 128", "again": "in bf16, one bit changed"}
    for arm in names:
        row = found.get(arm, {})
        if "mean_difference_of_last_tenth_percent" not in row:
            continue
        machine, gpu = result["arms"][arm]["machine"], result["arms"][arm].get("gpu", "CPU")
        where = f"{gpu}, torch {machine['versions']['torch']}"
        yield _row(
            f"loss after {row['updates']:,} updates of 0.55 B parameters {names[arm]}",
            f"{row['last_smoothed_loss']:.4f}",
            f"bf16: {found['bfloat16']['last_smoothed_loss']:.4f}",
            f"{row['mean_difference_of_last_tenth_percent']:+.3f}% over the last tenth",
            where,
            machine["commit"],
        )


def _server_overhead(result: dict[str, Any]) -> Iterator[str]:
    """Tokens a second through the server beside the engine alone, and the share of time that it adds."""
    work, machine, found = result["workload"], result["machine"], result["summary"]
    added = {name: f"{100 * value:.1f}%" for name, value in found["added_share"].items()}
    yield _row(
        f"{work['clients']} streams through the server, {work['new_tokens']} tokens each, a demo's model",
        f"{found['served_tokens_per_second']['median']:,.0f} tokens/s",
        f"the engine alone: {found['alone_tokens_per_second']['median']:,.0f}",
        f"{added['median']} added ({added['least']} to {added['most']})",
        f"{machine['cores']} CPU cores ({machine['processor'].split(' (')[0]}), torch {machine['versions']['torch']}",
        machine["commit"],
    )


ROWS = {
    "server_overhead": _server_overhead,
    "decode": _decode,
    "fp8_loss": _fp8_loss,
    "kernels": _kernels,
    "train_gpu": _train_gpu,
    "train": _train,
    "plan_vs_measured": _plan_vs_measured,
    "kernels_fp8": _kernels_fp8,
}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Every row."""
    return "\n".join([*HEADER, *(row for path in results() for row in rows(path))])


def headlines() -> str:
    """The README's rows. What a result does not hold yet is left out."""
    shown = []
    for name, starts in HEADLINES.items():
        path = RESULTS / f"{name}.json"
        every = list(rows(path)) if path.exists() else []
        found = [[row for row in every if row.startswith(f"| {start}")] for start in starts]
        shown += [matching[0] for matching in found if matching]
    return "\n".join([*HEADER, *shown])


def page_with(text: str, content: str) -> str:
    """`text` with `content` between the markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{content}\n{END}{after}"


def pages() -> dict[Path, str]:
    """What stands between the markers of each file."""
    return {ROOT / "README.md": headlines(), ROOT / "docs" / "benchmarks.md": table()}


def main() -> None:
    """Print all rows, or write the tables into their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update README.md and docs/benchmarks.md")
    if parser.parse_args().write:
        for path, content in pages().items():
            path.write_text(page_with(path.read_text(), content))
    else:
        print(table())


if __name__ == "__main__":
    main()

"""Every case of benchmarks/cases/ on one GPU: checked, timed in turn with its peers, held against the chip's limits.

Each topic (a file of cases) runs in a process of its own, so that a kernel which breaks the GPU's context or never ends
costs its own topic alone. Subjects take turns in rounds; a figure is the median of all samples, its spread the medians
of the fastest and the slowest round. Bytes are counted once in and once out, FLOPs of causal attention without the
masked half; shares are of rates measured in the same process.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import iter_modules
from statistics import median
from typing import Any

import torch
from pydantic import Field

from benchmarks import cases as case_package
from benchmarks.gpu_timing import GpuStopwatch, Limits, Stopwatch, measured_limits, require_gpu
from benchmarks.kernel_case import Case
from benchmarks.machine import describe
from benthic.config.settings import Settings
from benthic.errors import ConfigError
from benthic.files import write_atomic
from benthic.log import logger, to_stderr

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("liger-kernel", "deep-gemm", "flash-attn", "transformers", "torchao")
"""Packages whose versions stand in the result where they are installed."""


class Options(Settings):
    """`only`: pieces of topic or case names, all if empty. A figure is the median of `rounds` x `samples` calls."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    """Peers left out, by pieces of their names: compiling them takes most of a run's time."""
    rounds: int = Field(3, ge=1)
    samples: int = Field(5, ge=1)
    topic_seconds: float = Field(240, gt=0)
    """A topic that takes longer is stopped; what it had measured is kept."""
    seed: int = 0


def topics() -> list[str]:
    """Names of the files of cases."""
    return sorted(module.name for module in iter_modules(case_package.__path__))


def measure(options: Options) -> dict[str, Any]:
    """Every topic in turn; plain data. Raises ConfigError without a GPU or where `only` names no case."""
    require_gpu("a kernel")
    documents = [_in_process(topic, options) for topic in chosen_topics(options.only)]
    rows = [row for document in documents for row in document["cases"]]
    if not rows:
        raise ConfigError(f"no case matches {', '.join(options.only)}", hint=f"topics: {', '.join(topics())}")
    installed = {name for name in PEERS if _is_installed(name)}
    return {
        "name": "kernels",
        "machine": describe(("torch", "triton", *sorted(installed))) | {"gpu": torch.cuda.get_device_name()},
        "left_out": list(options.without),
        "rounds": options.rounds,
        "samples_a_round": options.samples,
        "limits": {document["topic"]: document["limits"] for document in documents if document["cases"]},
        "cases": rows,
    }


def chosen_topics(only: Sequence[str]) -> list[str]:
    """The topics that `only` names, where it names nothing else: any may hold a case of another name."""
    names = topics()
    return [name for name in names if name in only] if only and set(only) <= set(names) else list(names)


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _in_process(topic: str, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "topic.json"
        command = [sys.executable, "-m", "benchmarks.kernels", topic, options.model_dump_json(), str(kept)]
        ending = ""
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=options.topic_seconds, check=False, stdout=sys.stderr)
            if done.returncode:
                ending = f"its process ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {options.topic_seconds:.0f} s"
        document = json.loads(kept.read_text()) if kept.exists() else {"topic": topic, "limits": None, "cases": []}
    if ending:
        document["cases"].append({"topic": topic, "operation": topic, "shape": "", "error": ending})
    return document


def run_topic(
    topic: str, options: Options, stopwatch: Stopwatch, limits: Limits, device: str, keep: Callable[[dict], None]
) -> dict[str, Any]:
    """Measure a topic's cases, handing `keep` the document after each. What raises becomes a row that says so."""
    document: dict[str, Any] = {"topic": topic, "limits": limits.plain(), "cases": []}
    torch.manual_seed(options.seed)
    for case in _made(topic, device):
        if isinstance(case, Exception):
            document["cases"].append({"topic": topic, "operation": topic, "shape": "", "error": _text(case)})
        elif _wanted(topic, case, options.only):
            row = {"topic": topic} | run_case(case, options, stopwatch, limits)
            document["cases"].append(row)
            logger.info("%s", "\n".join(lines(row)))
        del case
        _release()
        keep(document)
    return document


def _made(topic: str, device: str) -> Iterator[Case | Exception]:
    """The topic's cases; an error while one is made ends the topic."""
    try:
        yield from import_module(f"{case_package.__name__}.{topic}").cases(device)
    except Exception as error:  # whatever it is, the other topics go on, and the row tells
        logger.exception("cases of %s", topic)
        yield error


def _wanted(topic: str, case: Case, only: Sequence[str]) -> bool:
    return not only or any(piece in topic or piece in f"{case.operation} {case.shape}" for piece in only)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_case(case: Case, options: Options, stopwatch: Stopwatch, limits: Limits) -> dict[str, Any]:
    """One row: each subject checked first, then timed in turn with the others."""
    chosen = [name for name in case.runs if name == "benthic" or not any(one in name for one in options.without)]
    subjects = {name: _checked(case, name) for name in chosen}
    right = [name for name, found in subjects.items() if "error" not in found]
    rounds: dict[str, list[list[float]]] = {name: [] for name in right}
    for _ in range(options.rounds):
        for name in right:
            rounds[name].append(stopwatch(case.runs[name], options.samples))
    for name, taken in rounds.items():
        subjects[name] |= _figures(case, taken, limits)
    row = {
        "operation": case.operation, "shape": case.shape, "unit": case.unit, "bytes": case.bytes, "flops": case.flops,
        "floor_seconds": limits.floor(case.bytes, case.flops, case.unit), "tolerance": case.tolerance,
        "subjects": subjects,
    }  # fmt: skip
    peers = [name for name in right if not name.startswith("benthic")]
    if "benthic" in right and peers:
        best = min(peers, key=lambda name: subjects[name]["seconds"])
        row |= {"best_peer": best, "times_best_peer": subjects[best]["seconds"] / subjects["benthic"]["seconds"]}
    return row


def _checked(case: Case, name: str) -> dict[str, Any]:
    try:
        found = float(case.check(case.runs[name]()))
    except Exception as error:  # a subject that cannot run here is a row that says so
        logger.exception("%s %s: %s", case.operation, case.shape, name)
        return {"error": _text(error)}
    if not found <= case.tolerance:
        return {"error": f"wrong: relative error {found:.2e}, allowed {case.tolerance:.0e}; not timed"}
    return {"relative_error": found}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


def _figures(case: Case, rounds: list[list[float]], limits: Limits) -> dict[str, float]:
    seconds = median(time for one in rounds for time in one)
    middles = sorted(median(one) for one in rounds)
    found = {
        "seconds": seconds,
        "fastest_round": middles[0],
        "slowest_round": middles[-1],
        "gigabytes_per_second": case.bytes / seconds / 1e9,
        "share_of_copy_rate": case.bytes / seconds / limits.copy,
        "share_of_limit": limits.floor(case.bytes, case.flops, case.unit) / seconds,
    }
    if case.flops:
        rate = case.flops / seconds
        found |= {"tflops": rate / 1e12, "share_of_matmul_rate": rate / limits.matmul(case.unit)}
    return found


def failures(result: dict[str, Any]) -> list[str]:
    """Cases that broke, and those whose benthic run is wrong or cannot run."""
    return [
        f"{row['operation']} {row['shape']}: {error}".replace(" :", ":")
        for row in result["cases"]
        if (error := row.get("error") or row.get("subjects", {}).get("benthic", {}).get("error"))
    ]


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A case for a reader: a line for each subject."""
    what = f"{row['operation']} {row['shape']}".strip()
    if "error" in row:
        yield f"{what}: {row['error']}"
        return
    for name, found in row["subjects"].items():
        if "error" in found:
            yield f"{what:<52}{name:<26} {found['error'].splitlines()[0][:120]}"
            continue
        spread = f"({found['fastest_round'] * 1e6:.0f} to {found['slowest_round'] * 1e6:.0f})"
        rate = (
            f"{found['tflops']:6.0f} TFLOP/s" if "tflops" in found else f"{found['gigabytes_per_second']:6.0f} GB/s   "
        )
        ratio = f"{row['times_best_peer']:.2f}x {row['best_peer']}" if name == "benthic" and "best_peer" in row else ""
        yield (
            f"{what:<52}{name:<26}{found['seconds'] * 1e6:9.1f} us {spread:<18}{rate} "
            f"{found['share_of_limit']:4.0%} of limit  {ratio}"
        ).rstrip()


def table(result: dict[str, Any]) -> str:
    """All cases, and what failed, for a reader."""
    found = [line for row in result["cases"] for line in lines(row)]
    broken = failures(result)
    return "\n".join([*found, f"{len(result['cases'])} cases, {len(broken)} failed"]) + "\n"


def main(topic: str, options: str, kept: str) -> None:
    """The process of one topic."""
    to_stderr()
    stopwatch = GpuStopwatch()
    limits = measured_limits(stopwatch)
    _release()
    run_topic(
        topic, Options(**json.loads(options)), stopwatch, limits, "cuda",
        lambda document: write_atomic(Path(kept), json.dumps(document)),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

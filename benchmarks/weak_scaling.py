"""Weak scaling on the GPUs of one host, each with as many tokens as one GPU has alone, beside torchtitan.

    python -m benchmarks.weak_scaling RESULT_FILE [ARM ...]

Every arm is a run of torchrun (weak_scaling_arm.py). Efficiency is an arm's speed on two GPUs divided by twice that of
the same arm on one. It is told only where the arm has computed what one GPU computes: losses, gradient norms and
experts' loads of the first updates, which have the same weights and batch under every layout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import torchtitan_peer
from benchmarks.gpu_timing import require_gpu
from benchmarks.machine import describe
from benchmarks.train_arms import ARMS
from benchmarks.train_gpu import ROOT
from benthic.errors import ConfigError, RunError, did_you_mean
from benthic.files import write_atomic
from benthic.log import logger, to_stderr

RANKS = 2
SECONDS = 150
"""An arm that takes longer is stopped and recorded as an error; torchtitan compiles first and gets half as much
again."""
NEAR = {"bfloat16": (1e-3, 1e-2, 1e-2), "float8": (2e-3, 3e-2, 3e-2)}
"""How near a loss and a gradient norm are to one GPU's, as a share of it, and what share of tokens' choices may differ:
sums in another order, rounded to the type that is computed in, turn some choices that were nearly even."""


@dataclass(frozen=True, slots=True)
class Run:
    """An arm of train_arms.py on some ranks, beside the run on one GPU that it is compared with."""

    arm: str
    layout: str
    alone: str | None = None

    @property
    def ranks(self) -> int:
        """Processes."""
        return 1 if self.alone is None else RANKS


RUNS: dict[str, Run] = {
    "bf16 alone": Run("bf16", ""),
    "bf16 fsdp=2,ep=2": Run("bf16", "fsdp=2,ep=2", "bf16 alone"),
    "float8 alone": Run("float8", ""),
    "float8 fsdp=2,ep=2": Run("float8", "fsdp=2,ep=2", "float8 alone"),
    "bf16 dp=2": Run("bf16", "dp=2", "bf16 alone"),
}
PEER, BESIDE = "torchtitan fsdp=2,ep=2", "bf16 fsdp=2,ep=2"
ORDER = ("bf16 alone", BESIDE, "float8 alone", "float8 fsdp=2,ep=2", PEER, "bf16 dp=2")
"""What matters most comes first: a run cut short keeps what it has."""


def measure(names: tuple[str, ...], output: Path) -> dict[str, Any]:
    """Run the named arms, or all; `output` is rewritten after each, so that a run cut short keeps them. An arm's
    failure is its row. Raises ConfigError without a GPU or for an unknown arm."""
    require_gpu("weak scaling")
    for name in names:
        if name not in ORDER:
            raise ConfigError(f"there is no arm {name!r}", did_you_mean(name, list(ORDER)))
    document: dict[str, Any] = {"name": "weak_scaling", "links": links(), "arms": {}}
    for name in names or ORDER:
        logger.info("arm %s", name)
        try:
            found = run_peer() if name == PEER else run_arm(RUNS[name])
        except RunError as error:
            found = {"error": error.message}
        document["arms"][name] = found
        document |= conclusions(document["arms"])
        write_atomic(output, json.dumps(document, indent=1) + "\n")
    return document


def links() -> str | None:
    """How the GPUs are linked, as the driver tells."""
    try:
        found = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout


def run_arm(run: Run) -> dict[str, Any]:
    """One of benthic's arms in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "arm.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
        command = [*start, "-m", "benchmarks.weak_scaling_arm", run.arm, run.layout, str(RANKS), str(kept)]
        told = _printed(command, SECONDS, ROOT, dict(os.environ))
        if not kept.exists():
            raise RunError(f"ended without a result: {_last_words(told)}")
        return json.loads(kept.read_text())


def run_peer() -> dict[str, Any]:
    """torchtitan on all GPUs, weights split over them and experts too; its speed is a GPU's, so it counts for each."""
    if lacking := torchtitan_peer.missing():
        raise RunError(f"torchtitan needs {', '.join(lacking)}")
    arm = ARMS["torchtitan"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torchtitan_peer.prepare(folder, arm, RANKS)
        environment = torchtitan_peer.environment(folder, ROOT, arm)
        found = torchtitan_peer.read_log(_printed(torchtitan_peer.command(RANKS), SECONDS * 1.5, folder, environment))
    return {
        "machine": describe(("torch", "triton", "torchtitan")),
        "arm": arm.model_dump(),
        "version": metadata.version("torchtitan"),
        "ranks": RANKS,
        "tokens_per_second": RANKS * found.pop("tokens_per_second"),
        "tokens_per_second_and_gpu_by_log": found.pop("tokens_per_second_by_log"),
    } | found


def _printed(command: list[str], seconds: float, folder: Path, environment: dict[str, str]) -> str:
    """What `command` printed. RunError when it takes longer than `seconds`: torchrun is asked to end its processes,
    which would keep the GPUs."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            told = process.communicate()[0]
            raise RunError(f"stopped after {seconds:.0f} s: {_last_words(told)}") from None


def _last_words(told: str) -> str:
    """Enough to hold a rank's error before torchrun's own summary."""
    return told.strip()[-6000:]


def conclusions(arms: dict[str, Any]) -> dict[str, Any]:
    """From what has been measured so far: where layouts disagree, the efficiency of those that agree, and how many
    times as fast as torchtitan the first of them is."""
    wrong: dict[str, str] = {}
    efficiency: dict[str, float] = {}
    done = {name: row for name, row in arms.items() if "error" not in row}
    for name, run in RUNS.items():
        if run.alone is None or name not in done or run.alone not in done:
            continue
        alone, spread = done[run.alone], done[name]
        if found := disagreement(alone, spread, ARMS[run.arm].compute):
            wrong[name] = found
        else:
            efficiency[name] = spread["tokens_per_second"] / (run.ranks * alone["tokens_per_second"])
    beside = {}
    if BESIDE in efficiency and PEER in done:
        beside = {"times_torchtitan": done[BESIDE]["tokens_per_second"] / done[PEER]["tokens_per_second"]}
    return {"disagreements": wrong, "efficiency": efficiency} | beside


def disagreement(alone: dict[str, Any], spread: dict[str, Any], compute: str) -> str | None:
    """What of the compared updates is not near enough to one GPU's; None where all is."""
    losses, norms, choices = NEAR[compute]
    for number, (one, other) in enumerate(zip(alone["compared"], spread["compared"], strict=True), start=1):
        for key, near in (("loss", losses), ("gradient_norm", norms)):
            if not abs(other[key] / one[key] - 1) <= near:
                return f"{key} of update {number} is {other[key]:.6g}, one GPU's {one[key]:.6g}"
        pairs = [pair for both in zip(one["loads"], other["loads"], strict=True) for pair in zip(*both, strict=True)]
        moved = sum(abs(a - b) for a, b in pairs) / 2 / max(1, sum(a for a, _ in pairs))
        if not moved <= choices or sum(a for a, _ in pairs) != sum(b for _, b in pairs):
            return f"{moved:.2%} of the choices of update {number} are other experts than on one GPU"
    return None


def table(document: dict[str, Any]) -> str:
    """The arms for a reader."""
    lines = []
    for name, row in document["arms"].items():
        if "error" in row:
            lines.append(f"{name:<24}{row['error'].splitlines()[-1][-200:]}")
            continue
        share = document["efficiency"].get(name)
        told = [f"{row['tokens_per_second']:>10,.0f} tokens/s", "" if share is None else f"efficiency {share:.3f}"]
        if exchange := row.get("exchange"):
            told.append(f"exchange {exchange['gigabytes_per_second']:.0f} GB/s, {exchange['share_of_nvlink']:.0%}")
            told.append(f"of NVLink's 450; a copy {exchange['copy_gigabytes_per_second']:.0f} GB/s")
        lines.append(f"{name:<24}{'  '.join(told)}")
    lines += [f"{name}: {what}" for name, what in document["disagreements"].items()]
    if "times_torchtitan" in document:
        lines.append(f"{BESIDE} is {document['times_torchtitan']:.2f} times as fast as {PEER}")
    return "\n".join(lines) + "\n"


def main(output: str, *names: str) -> int:
    """Measure; 1 where an arm of benthic's failed or computed something else than one GPU."""
    to_stderr()
    document = measure(names, Path(output))
    sys.stdout.write(table(document))
    failed = [name for name, row in document["arms"].items() if "error" in row and name != PEER]
    return 1 if failed or document["disagreements"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Training on one GPU, arm by arm, each in a process of its own, beside torchtitan and transformers where installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks import torchtitan_peer
from benchmarks.gpu_timing import require_gpu
from benchmarks.machine import describe
from benchmarks.readme_table import TRAINING_PAIRS
from benchmarks.step_profile import table as profile_table
from benchmarks.train_arms import ARMS, DEFAULT_ARMS, Arm, model_config
from benthic.config.settings import Settings
from benthic.errors import ConfigError, RunError, did_you_mean
from benthic.files import write_atomic
from benthic.log import logger
from benthic.plan.flops import training_flops_per_token

ROOT = Path(__file__).resolve().parents[1]


class Options(Settings):
    """`arms`: which of train_arms.ARMS, in that order; none means the usual ones whose packages are installed."""

    arms: tuple[str, ...] = ()
    steps: int = Field(20, ge=15)
    """Timed updates of benthic's and transformers' arms."""
    profile: bool = False
    """Trace one step of each benthic arm after timing it."""
    arm_seconds: float = Field(280, gt=0)
    """An arm that takes longer is stopped and recorded as an error."""


def measure(options: Options, output: Path | None, add: bool) -> dict[str, Any]:
    """Run the arms and merge their results; `output` is rewritten after each, so that a run cut short keeps them.

    With `add`, arms that `output` already holds stay unless they are measured again. An arm's failure is its row.
    Raises ConfigError without a GPU, on an unknown arm, or where a named arm's package is missing.
    """
    arms = chosen_arms(options)
    require_gpu("training")
    document = {"name": "train_gpu", "arms": {}}
    if add and output is not None and output.exists():
        document = json.loads(output.read_text())
    for name, arm in arms.items():
        logger.info("arm %s", name)
        document["arms"][name] = run_arm(name, arm, output, options)
        if output is not None:
            write_atomic(output, json.dumps(document, indent=1) + "\n")
    return document


def chosen_arms(options: Options) -> dict[str, Arm]:
    """The arms to run, with their steps."""
    for name in options.arms:
        if name not in ARMS:
            raise ConfigError(f"there is no arm {name!r}; there are {', '.join(ARMS)}", did_you_mean(name, list(ARMS)))
        if lacking := lacks(ARMS[name]):
            raise ConfigError(f"the arm {name} needs {', '.join(lacking)}", hint=f"pip install {' '.join(lacking)}")
    names = options.arms or tuple(name for name in DEFAULT_ARMS if not lacks(ARMS[name]))
    return {name: ARMS[name].replace(steps=options.steps) for name in names}


def lacks(arm: Arm) -> list[str]:
    """Packages that an arm needs and this Python lacks."""
    if arm.trainer == "torchtitan":
        return torchtitan_peer.missing()
    return [arm.trainer] if arm.trainer == "transformers" and find_spec("transformers") is None else []


def run_arm(name: str, arm: Arm, output: Path | None, options: Options) -> dict[str, Any]:
    """One arm's result, or what went wrong under "error"."""
    try:
        if arm.trainer == "torchtitan":
            return run_torchtitan(arm, options)
        profile = profile_path(output, name) if options.profile and arm.trainer == "benthic" else None
        return _run_own(arm, profile, options)
    except subprocess.TimeoutExpired as stopped:
        told = last_words(stopped.stderr or stopped.stdout)
        return {"arm": arm.model_dump(), "error": f"stopped after {options.arm_seconds:.0f} s{told and ': '}{told}"}
    except RunError as error:
        return {"arm": arm.model_dump(), "error": error.message}


def last_words(output: str | bytes | None) -> str:
    """The end of what a process printed; Python hands over bytes where it stopped the process."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text.strip()[-1500:]


def profile_path(output: Path | None, name: str) -> Path:
    """Where an arm's profile lies: beside the result."""
    folder, stem = (output.parent, output.stem) if output is not None else (Path.cwd(), "train_gpu")
    return folder / f"{stem}_profile_{name}.json"


def _run_own(arm: Arm, profile: Path | None, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "arm.json"
        command = [sys.executable, "-m", "benchmarks.train_arm", arm.model_dump_json(), str(kept)]
        command += [str(profile.resolve())] if profile is not None else []
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=options.arm_seconds,
            check=False,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
        )
        sys.stderr.write(done.stderr)
        if done.returncode or not kept.exists():
            raise RunError(f"ended with code {done.returncode}: {last_words(done.stderr)}")
        result = json.loads(kept.read_text())
    if profile is not None:
        logger.info("%s", profile_table(json.loads(profile.read_text())))
    return result


def run_torchtitan(arm: Arm, options: Options) -> dict[str, Any]:
    """torchtitan's own trainer on the arm's model, and its own figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torchtitan_peer.prepare(folder, arm)
        done = subprocess.run(
            torchtitan_peer.command(), cwd=folder, env=torchtitan_peer.environment(folder, ROOT, arm),
            timeout=options.arm_seconds, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        found = torchtitan_peer.read_log(done.stdout)
    flops = training_flops_per_token(model_config(arm.model), arm.sequence_length)
    machine = describe(("torch", "triton", "torchtitan")) | {"gpu": torch.cuda.get_device_name()}
    return {
        "machine": machine, "arm": arm.model_dump(), "version": metadata.version("torchtitan"),
        "flops_per_token": flops, "tflops": found["tokens_per_second"] * flops / 1e12,
    } | found  # fmt: skip


def failures(document: dict[str, Any]) -> list[str]:
    """benthic's arms that did not end well."""
    return [
        f"{name}: {row['error']}"
        for name, row in document["arms"].items()
        if "error" in row and row["arm"]["trainer"] == "benthic"
    ]


def table(document: dict[str, Any]) -> str:
    """The arms for a reader."""
    lines = [
        f"{'arm':<22}{'tokens/s':>10}{'TFLOP/s':>9}{'of bf16':>10}{'ms a step':>22}"
        f"{'GiB: planned':>14}{'allocated':>10}{'reserved':>9}   MaxVio"
    ]
    for name, row in document["arms"].items():
        if "error" in row:
            lines.append(f"{name:<22}{row['error'].splitlines()[-1][-200:]}")
            continue
        share = f"{row['matmul_share']:.1%}" if "matmul_share" in row else ""
        spread = ""
        if (seconds := row.get("step_seconds")) is not None:
            low, high = seconds["first_quartile"] * 1e3, seconds["third_quartile"] * 1e3
            spread = f"{seconds['median'] * 1e3:.1f} ({low:.1f} to {high:.1f})"
        memory = row.get("memory", {})
        gib = [
            f"{memory[key]:.1f}" if key in memory else "" for key in ("planned_gib", "allocated_gib", "reserved_gib")
        ]
        violation = f"{max(row['max_violation']):.2f}" if row.get("max_violation") else ""
        lines.append(
            f"{name:<22}{row['tokens_per_second']:>10,.0f}{row['tflops']:>9.0f}{share:>10}{spread:>22}"
            f"{gib[0]:>14}{gib[1]:>10}{gib[2]:>9}   {violation}"
        )
    speeds = {name: row["tokens_per_second"] for name, row in document["arms"].items() if "error" not in row}
    for ours, peer in TRAINING_PAIRS:
        if ours in speeds and peer in speeds:
            lines.append(f"{ours} is {speeds[ours] / speeds[peer]:.2f} times as fast as {peer}")
    return "\n".join(lines) + "\n"

"""What a result was measured on: hardware, versions, commit, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path


def describe(packages: tuple[str, ...]) -> dict:
    """Plain data that belongs beside every number."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "command": "benthic " + " ".join(sys.argv[1:]),
    }


def processor() -> str:
    """The processor's name and widest vector unit, as the operating system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "")
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, {widest})"


def commit() -> str:
    """What the environment's BENTHIC_COMMIT says, for a copy whose repository knows another; else the checkout's
    commit, with a mark when files differ from it."""
    if stated := os.environ.get("BENTHIC_COMMIT"):
        return stated
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:
        found = ""
    return found.strip() or "no git checkout"

"""`benthic doctor`: versions, device, disk, what is missing and the command that mends it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import warnings
from importlib import metadata
from pathlib import Path

REQUIRED = ("torch", "numpy", "pydantic", "rich", "pyyaml", "safetensors", "tokenizers", "jinja2", "jaxtyping")
OPTIONAL = {
    "pyarrow": ("parquet as training data", "pip install 'benthic[data]'"),
    "matplotlib": ("plots of plans", "pip install 'benthic[plot]'"),
    "transformers": ("benchmarks beside transformers", "pip install transformers"),
    "triton": ("GPU kernels; comes with CUDA builds of torch on Linux", "see pytorch.org for a CUDA build"),
}


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine(folder: Path) -> dict:
    """Everything doctor knows, as plain data. `problems` are what stops benthic; `advice` is what would widen it."""
    found: dict = {
        "benthic": version_of("benthic") or "a source tree, not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_disk_bytes": shutil.disk_usage(folder).free,
        "packages": {name: version_of(name) for name in (*REQUIRED, *OPTIONAL)},
        "problems": [],
        "advice": [],
    }
    for name in REQUIRED:
        if found["packages"][name] is None:
            found["problems"].append(f"{name} is missing: pip install {name}")
    for name, (purpose, command) in OPTIONAL.items():
        if found["packages"][name] is None:
            found["advice"].append(f"{name} is absent ({purpose}): {command}")
    if found["free_disk_bytes"] < 2 * 1024**3:
        found["problems"].append(f"less than 2 GiB free in {folder}: make room, or choose another --run-folder")
    if found["packages"]["torch"] is not None:
        found["device"] = _device(found["problems"])
    return found


def _device(problems: list[str]) -> dict:
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch is installed but does not load ({error}): reinstall it")
        return {"kind": "none"}
    device = {"kind": "cpu", "torch_threads": torch.get_num_threads(), "cuda_build": torch.version.cuda}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        device |= {
            "kind": "cuda",
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "compute_capability": capability,
            "bf16": torch.cuda.is_bf16_supported(),
            "fp8": (properties.major, properties.minor) >= (8, 9),
        }
    elif torch.version.cuda and caught:
        problems.append(f"torch is built for CUDA but finds no usable GPU: {caught[0].message}")
    return device


def main(arguments: list[str]) -> int:
    """Print the findings; exit code 1 when something stops benthic from working."""
    parser = argparse.ArgumentParser(prog="benthic doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args(arguments)
    found = examine(Path.cwd())
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 1 if found["problems"] else 0


def _show(found: dict) -> None:
    print(f"benthic {found['benthic']}, Python {found['python']} on {found['platform']}")
    device = found.get("device", {"kind": "unknown"})
    if device["kind"] == "cuda":
        gib = device["memory_bytes"] / 1024**3
        print(f"device: {device['count']} x {device['name']}, {gib:.0f} GiB, capability {device['compute_capability']}")
    else:
        print(f"device: {device['kind']}, {found['cores']} cores")
    print(f"free disk here: {found['free_disk_bytes'] / 1024**3:.1f} GiB")
    print("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version))
    for line in found["advice"]:
        print(f"optional: {line}")
    for line in found["problems"]:
        print(f"problem: {line}")
    print("nothing is missing" if not found["problems"] else f"{len(found['problems'])} problem(s) to mend")

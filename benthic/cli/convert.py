"""`benthic convert`: a checkpoint folder into another, fp8 <-> bf16 <-> fp32, sharded <-> one file."""

from __future__ import annotations

import argparse
import re
import sys

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def byte_count(text: str) -> int:
    """ "5GB", "500 MiB" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 5GB, 500MiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2]])


def main(arguments: list[str]) -> int:
    """Convert and report on stderr; nothing on stdout but the target's name."""
    parser = argparse.ArgumentParser(prog="benthic convert", description=__doc__)
    parser.add_argument("source", help="folder with config.json and safetensors weights")
    parser.add_argument("target", help="folder to make; it must be new or empty")
    parser.add_argument("--weights", required=True, choices=("fp8", "bf16", "fp32"), help="format of the weights")
    parser.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="limit of one file (default 5GB)"
    )
    parser.add_argument(
        "--power-of-two-scales", action="store_true", help="fp8 scales rounded up to powers of two (ue8m0)"
    )
    options = parser.parse_args(arguments)
    if options.power_of_two_scales and options.weights != "fp8":
        parser.error("--power-of-two-scales belongs to --weights fp8")
    _convert(options)
    print(options.target)
    return 0


def _convert(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from benthic.checkpoint.conversion import convert

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as display:
        task = display.add_task("converting", total=None)
        convert(
            options.source,
            options.target,
            options.weights,
            max_shard_bytes=options.max_shard_size,
            power_of_two_scales=options.power_of_two_scales,
            progress=lambda done, total: display.update(task, completed=done, total=total),
        )

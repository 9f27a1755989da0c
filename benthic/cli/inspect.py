"""`benthic inspect`: what a checkpoint folder holds, and its faults; exit code 1 when there are any.

Headers alone are read, unless --check (values) or --hashes (files) ask for more.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from fnmatch import fnmatchcase

from benthic.checkpoint.folder import Entry, total_bytes
from benthic.checkpoint.inspection import (
    Inspection,
    Total,
    file_hash,
    inspect_folder,
    non_finite_tensors,
    totals_by_dtype,
    totals_by_part,
)
from benthic.config.published import config_to_published


def main(arguments: list[str]) -> int:
    """Print the findings."""
    parser = argparse.ArgumentParser(
        prog="benthic inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder with config.json and safetensors weights")
    parser.add_argument("--json", action="store_true", help="machine-readable output, every tensor listed")
    parser.add_argument("--hashes", action="store_true", help="sha256 of every file (reads them whole)")
    parser.add_argument("--check", action="store_true", help="look for values that are not finite (reads all weights)")
    parser.add_argument("--tensor", metavar="PATTERN", help="list the tensors whose names match, like '*.gate.weight'")
    options = parser.parse_args(arguments)
    inspection = inspect_folder(options.folder)
    faults = list(inspection.faults)
    if options.check:
        faults += non_finite_tensors(inspection)
    files = _files(inspection, options.hashes)
    chosen = [one for one in inspection.entries.values() if fnmatchcase(one.name, options.tensor or "*")]
    if options.json:
        print(json.dumps(_as_data(inspection, chosen, files, faults), indent=2))
    else:
        _show(inspection, chosen, files, is_listing=options.tensor is not None)
        for fault in faults:
            print(f"fault: {fault}")
        print("no faults" if not faults else f"{len(faults)} fault(s)")
    return 1 if faults else 0


def _files(inspection: Inspection, with_hashes: bool) -> dict[str, dict]:
    paths = sorted(path for path in inspection.folder.iterdir() if path.is_file())
    return {
        path.name: {"bytes": path.stat().st_size} | ({"sha256": file_hash(path)} if with_hashes else {})
        for path in paths
    }


def _as_data(inspection: Inspection, chosen: list[Entry], files: dict, faults: list[str]) -> dict:
    return {
        "folder": str(inspection.folder),
        "config": config_to_published(inspection.config) if inspection.config else None,
        "parameters": inspection.num_parameters,
        "bytes": total_bytes(inspection.entries.values()),
        "by_part": {name: asdict(total) for name, total in totals_by_part(inspection).items()},
        "by_dtype": {name: asdict(total) for name, total in totals_by_dtype(inspection.entries.values()).items()},
        "files": files,
        "tensors": [asdict(entry) | {"bytes": entry.num_bytes} for entry in chosen],
        "faults": faults,
    }


def _show(inspection: Inspection, chosen: list[Entry], files: dict[str, dict], is_listing: bool) -> None:
    if inspection.config:
        print(_summary(inspection))
    for name, facts in files.items():
        print(f"{_size(facts['bytes'])}  {facts.get('sha256', '')}{'  ' if 'sha256' in facts else ''}{name}")
    if is_listing:
        for entry in chosen:
            print(f"{_size(entry.num_bytes)}  {entry.dtype:<8} {list(entry.shape)!s:<18} {entry.name}  ({entry.file})")
        return
    _show_totals("part", totals_by_part(inspection))
    _show_totals("dtype", totals_by_dtype(inspection.entries.values()))
    _show_patterns(chosen)


def _summary(inspection: Inspection) -> str:
    config = inspection.config
    assert config is not None
    words = [
        f"{config_to_published(config)['model_type']}, {inspection.num_parameters:,} parameters",
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.attention_kind} with "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}",
    ]
    if config.n_routed_experts:
        words.append(
            f"{config.n_shared_experts} shared + {config.n_routed_experts} routed experts, "
            f"{config.num_experts_per_tok} chosen"
        )
    if config.num_nextn_predict_layers:
        words.append(f"{config.num_nextn_predict_layers} prediction layer(s)")
    return "; ".join(words)


def _show_totals(kind: str, totals: dict[str, Total]) -> None:
    print(f"\n{'bytes':>11}  {kind:<12}{'tensors':>9}{'elements':>18}")
    for name, total in totals.items():
        print(f"{_size(total.bytes)}  {name:<12}{total.tensors:>9,}{total.elements:>18,}")


def _show_patterns(entries: list[Entry]) -> None:
    """Names with their layer and expert numbers folded into *, one line a shape and dtype."""
    found: dict[tuple, int] = {}
    for entry in entries:
        key = (re.sub(r"\.\d+(?=\.)", ".*", entry.name), entry.dtype, entry.shape)
        found[key] = found.get(key, 0) + 1
    print(f"\n{'count':>7}  {'dtype':<8} {'shape':<18} name")
    for (name, dtype, shape), count in found.items():
        print(f"{count:>7,}  {dtype:<8} {list(shape)!s:<18} {name}")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:7.2f} {unit}"
    return f"{num_bytes:7d} B  "

"""What a checkpoint folder holds, and what is wrong with it; from headers, so no torch and no reading of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from benthic.checkpoint.folder import Entry, read_entries
from benthic.checkpoint.layout import SCALE_SUFFIX, find_faults, present_rows, without_absent_predictions
from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.errors import BenthicError, CheckpointError


@dataclass(frozen=True, slots=True)
class Inspection:
    """`config` is None when config.json is unusable, `entries` empty when a weight file is; `faults` says why."""

    folder: Path
    config: ModelConfig | None
    entries: dict[str, Entry]
    faults: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of the model, each once: without scales and second copies."""
        return sum(row.size for row in parameters(self.config)) if self.config else 0


@dataclass(frozen=True, slots=True)
class Total:
    """How much of one kind there is."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0

    def plus(self, entry: Entry) -> Total:
        """With one tensor more."""
        return Total(self.tensors + 1, self.elements + entry.size, self.bytes + entry.num_bytes)


def inspect_folder(folder: str | Path) -> Inspection:
    """Read config.json and all headers. Raises CheckpointError only where there is no folder; faults are collected."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}", hint="give a folder with config.json and weights")
    faults: list[str] = []
    entries: dict[str, Entry] = {}
    config: ModelConfig | None = None
    try:
        entries = read_entries(folder)
    except CheckpointError as error:
        faults.append(error.message)
    try:
        config = ModelConfig.from_pretrained(folder)
    except BenthicError as error:
        faults.append(error.message)
    if config and entries:
        config = without_absent_predictions(config, entries, folder)
        found = find_faults(config, entries)
        faults += [f"missing: {name}" for name in found.missing]
        faults += [f"unexpected: {name}" for name in found.unexpected]
        faults += [f"misshapen: {text}" for text in found.misshapen]
        faults += [f"wrong dtype: {text}" for text in found.mistyped]
    return Inspection(folder, config, entries, tuple(faults))


def totals_by_dtype(entries: Iterable[Entry]) -> dict[str, Total]:
    """Totals for each dtype as stored, largest first."""
    return _totals((entry.dtype, entry) for entry in entries)


def totals_by_part(inspection: Inspection) -> dict[str, Total]:
    """Totals for each part of the model, largest first: scales with their weights, prediction layers as one part."""
    part_of: dict[str, str] = {}
    if inspection.config:
        for row in present_rows(inspection.config, inspection.entries):
            layer = row.source.layer
            is_extra = row.duplicate or (layer is not None and layer >= inspection.config.num_hidden_layers)
            part_of[row.name] = "prediction" if is_extra else row.source.part
    return _totals(
        (part_of.get(entry.name.removesuffix(SCALE_SUFFIX), "unexpected"), entry)
        for entry in inspection.entries.values()
    )


def _totals(pairs: Iterable[tuple[str, Entry]]) -> dict[str, Total]:
    totals: dict[str, Total] = {}
    for kind, entry in pairs:
        totals[kind] = totals.get(kind, Total()).plus(entry)
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def non_finite_tensors(inspection: Inspection) -> Iterator[str]:
    """Read every tensor and say which hold values that are not finite, and how many. Needs torch."""
    import torch

    from benthic.checkpoint.reader import Checkpoint, TensorReader

    if inspection.config is None:
        return
    with TensorReader(Checkpoint(inspection.folder, inspection.config, inspection.entries)) as reader:
        for entry in inspection.entries.values():
            tensor = reader.stored(entry.name)
            if not tensor.dtype.is_floating_point:
                continue
            bad = prod(entry.shape) - int(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).sum())
            if bad:
                yield f"not finite: {entry.name}, {bad} of {entry.size} elements"

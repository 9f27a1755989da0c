"""The files of a checkpoint folder, seen through their headers alone; no torch.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json` whose `weight_map` names the shard of
every tensor. The safetensors library checks each header (lengths, offsets, JSON); here its verdicts get the file's
name, and all broken files are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from benthic.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INCOMING = ".incoming"
"""Subfolder of complete new files that a save was about to move into place (see staging.py)."""
SHARD_PATTERN = "model-[0-9]*-of-[0-9]*.safetensors"

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes of an element, by safetensors' name of its dtype."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file. `dtype` is safetensors' name ("BF16"); `file` is a name inside the folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk; 0 for a dtype narrower than a byte, which no weight here may have."""
        return self.size * ITEM_BYTES.get(self.dtype, 0)


def named_list(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` of `names`, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder, file by file in the order of its bytes.

    Raises CheckpointError when a file is absent, truncated or corrupt, when the index names a shard that does not
    exist, lies outside the folder or lacks its tensor, or when two shards hold the same tensor.
    """
    _refuse_interrupted_save(folder)
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS]
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    twice: list[str] = []
    for file in files:
        try:
            found = _file_entries(folder, file)
        except CheckpointError as error:
            faults.append(error.message)
            continue
        twice += [f"{entry.name} ({entries[entry.name].file}, {file})" for entry in found if entry.name in entries]
        entries |= {entry.name: entry for entry in found}
    if faults:
        raise CheckpointError(
            "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more files" if len(faults) > 8 else ""),
            hint="copy or download these files again; `benthic inspect FOLDER --hashes` prints what is there",
        )
    if twice:
        raise CheckpointError(f"{folder}: {len(twice)} tensors lie in two shards: {named_list(twice)}")
    _refuse_stale_index(folder, weight_map or {}, entries)
    return entries


def _file_entries(folder: Path, file: str) -> list[Entry]:
    path = folder / file
    if len(file) > 255 or not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with safe_open(path, framework="np") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            return [Entry(name, one.get_dtype(), tuple(one.get_shape()), file) for name, one in slices]
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} ({size:,} bytes) is truncated or not a safetensors file: {error}") from None


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard; None when the folder holds one plain file."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        if index.is_file() and set(_read_index(index).values()) != {WEIGHTS}:
            raise CheckpointError(
                f"{folder} holds both {WEIGHTS} and {INDEX} of other shards, so it is unclear which is the model",
                hint="remove the one that is stale",
            )
        return None
    if index.is_file():
        return _read_index(index)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    found = f"; it holds {named_list(others)}" if others else ""
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}",
        hint="benthic reads safetensors only, never pickled files; re-save other formats with transformers first"
        if others
        else "give a folder with config.json and weights in safetensors",
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        data: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not valid JSON: {error}") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    for name, file in weight_map.items():
        if not _is_plain_name(file):
            raise CheckpointError(
                f"{index} places {name} in {file!r}; a shard must be the name of a .safetensors file in that folder"
            )
    return weight_map


def _is_plain_name(file: object) -> bool:
    if not isinstance(file, str) or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
        return False
    return PurePosixPath(file).name == file


def _refuse_stale_index(folder: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    wrong = [name for name, file in weight_map.items() if name not in entries or entries[name].file != file]
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} places {len(wrong)} tensors in shards that do not hold them: {named_list(wrong)}",
            hint="index and shards come from different checkpoints; fetch both again",
        )


def _refuse_interrupted_save(folder: Path) -> None:
    incoming = folder / INCOMING
    if incoming.is_dir():
        raise CheckpointError(
            f"{folder} is between two checkpoints: a save was cut off while it moved its finished files into place",
            hint=f"finish it with: mv {incoming}/* {folder}/ && rmdir {incoming}   (or save there again)",
        )


def checkpoint_files(folder: Path) -> set[str]:
    """Names of the weight files and index that lie in `folder`, stale ones included."""
    names = {path.name for path in folder.glob(SHARD_PATTERN)}
    return names | {name for name in (WEIGHTS, INDEX) if (folder / name).is_file()}


def total_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of all tensors, headers left out."""
    return sum(entry.num_bytes for entry in entries)

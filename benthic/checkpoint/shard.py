"""Writing one safetensors file whose tensors arrive one by one.

`safetensors.torch.save_file` wants every tensor of the file in memory at once. Here names, dtypes and shapes are known
beforehand, so the header goes first and each tensor to its offset: a file of any size needs memory for one tensor.
Reading is left to the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from benthic.checkpoint.folder import ITEM_BYTES, Entry

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What is written, by safetensors' name."""


class ShardWriter:
    """One file in the making; `write` every one of `entries`, in any order."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        # Wide elements first, so that every tensor is aligned to its element, as safetensors itself writes.
        ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
        self._offsets: dict[str, int] = {}
        offset = 0
        for entry in ordered:
            end = offset + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (offset, end)}
            self._offsets[entry.name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._pending = {entry.name: entry for entry in entries}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                assert not self._pending, f"never written: {sorted(self._pending)}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the tensor that was announced as `name`."""
        entry = self._pending.pop(name)
        assert tuple(tensor.shape) == entry.shape, f"{name} is {list(tensor.shape)}, announced as {list(entry.shape)}"
        assert tensor.dtype == TORCH_DTYPES[entry.dtype], f"{name} is {tensor.dtype}, announced as {entry.dtype}"
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

"""Weights of a published folder, tensor by tensor, into a module that already has its memory.

    checkpoint = open_checkpoint(folder)      headers only: every fault of the folder is found before a byte is read
    load_into(module, checkpoint)             fills parameters and buffers in place

Tensors are views of the memory-mapped file and are copied (dequantised, cast) straight into the module. Mapped pages
count as resident, so the mapping is dropped and renewed every MAPPED_BYTES: the peak is the module, that much, and
one tensor in fp32 where it is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from benthic.checkpoint.folder import Entry, named_list, read_entries
from benthic.checkpoint.layout import (
    DEFAULT_BLOCK,
    FP8,
    SCALE_SUFFIX,
    block_size,
    find_faults,
    present_rows,
    refuse_faults,
    without_absent_predictions,
)
from benthic.config.manifest import StoredTensor, parameters
from benthic.config.model import ModelConfig
from benthic.errors import CheckpointError
from benthic.log import logger
from benthic.numerics.reference.quantisation import dequantise_blocks, quantise_blocks

MAPPED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose tensors are those of `config`, from which prediction layers that it lacks were taken out."""

    folder: Path
    config: ModelConfig
    entries: dict[str, Entry]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json and every header of `folder`. Raises ConfigError or CheckpointError, with all faults in one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{str(folder)!r} is not a folder" if folder.exists() else f"there is no folder {str(folder)!r}",
            hint="give a folder with config.json and safetensors weights; `benthic demo` makes one, and "
            "`hf download OWNER/NAME --local-dir FOLDER` fetches one",
        )
    entries = read_entries(folder)
    config = without_absent_predictions(ModelConfig.from_pretrained(folder), entries, folder)
    refuse_faults(find_faults(config, entries), config, folder)
    return Checkpoint(folder, config, entries)


class TensorReader:
    """Reads tensors of a checkpoint through memory maps that it renews; a tensor keeps its map alive."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._block = block_size(checkpoint.config)
        # A weight and its scale may lie in different shards, so several files can be open.
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def stored(self, name: str) -> Tensor:
        """The tensor as it is on disk."""
        entry = self._checkpoint.entries[name]
        path = self._checkpoint.folder / entry.file
        self._mapped_bytes += entry.num_bytes
        if self._mapped_bytes > MAPPED_BYTES:
            self._open.clear()
            self._mapped_bytes = entry.num_bytes
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(path, framework="pt")
            return self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot read {name} from {path}: {error}") from None

    def weight(self, name: str) -> Tensor:
        """The tensor as numbers: FP8 weights times their scales, float32; others in the dtype they are stored in."""
        tensor = self.stored(name)
        if self._checkpoint.entries[name].dtype != FP8:
            return tensor
        return dequantise_blocks(tensor, self.stored(name + SCALE_SUFFIX), self._block)

    def quantised(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """e4m3 values and float32 factors for 128 x 128: as they are stored, or made of other numbers on `device`."""
        if self._checkpoint.entries[name].dtype == FP8 and self._block == DEFAULT_BLOCK:
            return self.stored(name), self.stored(name + SCALE_SUFFIX).float()
        return quantise_blocks(self.weight(name).to(device))


def read_weights(checkpoint: Checkpoint) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Every weight as numbers, in the order of the bytes on disk, duplicates last. Drop each before the next."""
    with TensorReader(checkpoint) as reader:
        for row in _in_file_order(checkpoint):
            yield row, reader.weight(row.name)


def _in_file_order(checkpoint: Checkpoint) -> list[StoredTensor]:
    rows = {row.name: row for row in present_rows(checkpoint.config, checkpoint.entries)}
    in_file_order = [rows[name] for name in checkpoint.entries if name in rows]
    return sorted(in_file_order, key=lambda row: row.duplicate)


@torch.no_grad()
def load_into(
    module: nn.Module,
    source: Checkpoint | str | Path,
    held: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Fill the parameters and persistent buffers of `module` in place, whatever their device and dtype.

    The module's tensors are named and shaped as in the manifest. One in e4m3 has its factors in a buffer beside it,
    named as on disk: both are copied as they are stored, or quantised where they are stored otherwise. Copies of
    embedding and head that prediction layers store are compared with the originals: a difference is logged, because
    benthic shares them. `held` names stacks of experts that hold some of them, and which.
    """
    held = held or {}
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    targets = _targets(module, checkpoint, held)
    with TensorReader(checkpoint) as reader:
        for row in _in_file_order(checkpoint):
            target, place = targets[row.source.name], row.expert
            if place is not None and row.source.name in held:
                if place not in held[row.source.name]:
                    continue
                place = held[row.source.name].index(place)
            if place is not None:
                target = target[place, row.first_row : row.first_row + row.shape[0]]
            if target.dtype == torch.float8_e4m3fn:
                values, factors = reader.quantised(row.name, target.device)
                target.copy_(values)
                _factors_of(row, place, targets[row.source.name + SCALE_SUFFIX]).copy_(factors)
            elif not row.duplicate:
                target.copy_(reader.weight(row.name))
            elif not _same(target, reader.weight(row.name)):
                _tell_difference(row, checkpoint)


def _factors_of(row: StoredTensor, place: int | None, factors: Tensor) -> Tensor:
    """Those of one stored tensor. An expert's gate and up each begin with a block of their own."""
    if place is None:
        return factors
    first = -(-row.first_row // DEFAULT_BLOCK[0])
    return factors[place, first : first - (-row.shape[0] // DEFAULT_BLOCK[0])]


def _targets(module: nn.Module, checkpoint: Checkpoint, experts: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    rows = list(parameters(checkpoint.config))
    shapes = {row.name: row.shape for row in rows}
    shapes |= {name: (len(some), *shapes[name][1:]) for name, some in experts.items()}
    wrong = [name for name, shape in shapes.items() if name not in held or tuple(held[name].shape) != shape]
    wrong += sorted({name for name, _ in module.named_parameters()} - {row.name for row in rows})
    if wrong:
        raise CheckpointError(
            f"the module's tensors are not those of {checkpoint.folder}; {len(wrong)} differ: {named_list(wrong)}",
            hint="build the module from the checkpoint's own config",
        )
    rounded = [row.name for row in rows if row.dtype == "float32" and held[row.name].dtype != torch.float32]
    if rounded:
        raise CheckpointError(
            f"{named_list(rounded)} must be float32 in the module: biases near 5 are 0.03 apart in bfloat16, which "
            "changes the experts that are chosen"
        )
    return held


def _same(target: Tensor, tensor: Tensor, rows: int = 4096) -> bool:
    pairs = zip(target.split(rows), tensor.split(rows), strict=True)
    return all(torch.equal(held, stored.to(held.device, held.dtype)) for held, stored in pairs)


def _tell_difference(row: StoredTensor, checkpoint: Checkpoint) -> None:
    if row.name == "lm_head.weight":
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says tie_word_embeddings, but the stored lm_head.weight differs from "
            "model.embed_tokens.weight",
            hint="set tie_word_embeddings to false in config.json",
        )
    logger.warning(
        f"{checkpoint.folder}: {row.name} differs from {row.source.name}; the prediction layer will use the latter"
    )

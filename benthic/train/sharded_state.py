"""The training state of a run on several ranks: each writes the blocks it holds, and any layout reads them back.

    checkpoints/step-00000100/
        weights/shard-00001-model-00001-of-00001.safetensors   rank 0's blocks, with their places in the whole
        weights/shard-00002-...                                 rank 1's; of copies one is written
        moments/  average/                                      likewise
        state.json  random.safetensors                          as one process writes them

torch.distributed.checkpoint does the writing and the cutting anew, with safetensors as its format: nothing is pickled
on the disk. A state that one process wrote is read block by block from its files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benthic.config.manifest import Parameter, parameters
from benthic.config.model import ModelConfig
from benthic.errors import BenthicError, CheckpointError, PeerError
from benthic.parallel.placement import as_distributed, part
from benthic.parallel.world import World
from benthic.train.adamw import FIRST, SECOND
from benthic.train.disk import explained, partial_name, publish_folder
from benthic.train.state import State, keep_newest, read_numbers, state_folder, write_numbers


def is_sharded(folder: Path) -> bool:
    """Whether several ranks wrote this state."""
    return (folder / "weights").is_dir()


class ShardedStates:
    """Saving and reading the states of one model on one world."""

    def __init__(self, config: ModelConfig, world: World) -> None:
        self._world = world
        self._rows = {row.name: row for row in parameters(config) if world.holds(row)}

    def save(self, checkpoints: Path, state: State, keep: int | None) -> None:
        """Write `state`, whose tensors are this rank's blocks; every rank calls it. Errors as `save_state`'s."""
        step = state.progress.step
        final, what = state_folder(checkpoints, step), f"the training state of step {step}"
        if not self._world.leads:
            if self._world.agree(False):
                raise PeerError(f"rank 0 could not begin to write {what}")
            self._write(partial_name(final), state, what)
        else:
            self._publish(final, state, what)
            keep_newest(checkpoints, keep)
        self._world.wait_for_all()

    def _publish(self, final: Path, state: State, what: str) -> None:
        begun = False

        def fill(folder: Path) -> None:
            nonlocal begun
            begun = True
            self._world.agree(False)
            self._write(folder, state, what)
            write_numbers(folder, state)

        try:
            publish_folder(final, what, fill)
        except BenthicError:
            if not begun:
                self._world.agree(True)
            raise

    def _write(self, folder: Path, state: State, what: str) -> None:
        kinds = {"weights": state.weights, "moments": state.moments, "average": state.average}
        for kind, tensors in kinds.items():
            if not tensors:
                continue
            blocks = {name: as_distributed(self._row(name), block, self._world) for name, block in tensors.items()}
            writer = HuggingFaceStorageWriter(str(folder / kind), save_distributed=True)
            try:
                dcp.save(blocks, storage_writer=writer, process_group=self._world.control)
            except CheckpointException as error:
                rank, (cause, _) = next(iter(error.failures.items()))
                with explained(f"{what} (rank {rank})", folder):
                    raise cause from None

    def read(self, folder: Path, device: torch.device) -> State:
        """This rank's blocks of a state that any layout wrote, one process included."""
        average = any((folder / name).exists() for name in ("average", "average.safetensors"))
        trained = [name for name, row in self._rows.items() if row.group != "routing_bias"]
        moments = [f"{kind}.{name}" for name in trained for kind in (FIRST, SECOND)]
        progress = read_numbers(folder)
        return State(
            progress=progress,
            weights=self._blocks(folder / "weights", list(self._rows), device),
            moments=self._blocks(folder / "moments", moments, device) if progress.step else {},
            average=self._blocks(folder / "average", list(self._rows), device) if average else None,
        )

    def _blocks(self, path: Path, names: list[str], device: torch.device) -> dict[str, Tensor]:
        try:
            if path.is_dir():
                return self._cut_anew(path, names, device)
        except CheckpointException as error:  # the rest is of ranks that lost each other: nothing is wrong on the disk
            raise _unreadable(path, error) from None
        try:
            with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
                return {name: file.get_slice(name)[self._block(name)].to(device) for name in names}
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise _unreadable(path, error) from None

    def _cut_anew(self, path: Path, names: list[str], device: torch.device) -> dict[str, Tensor]:
        empty = {name: torch.empty(part(self._row(name), self._world).size, device=device) for name in names}
        wanted = {name: as_distributed(self._row(name), block, self._world) for name, block in empty.items()}
        reader = HuggingFaceStorageReader(str(path))
        if self._world.size == 1:
            _load_alone(wanted, reader)
        else:
            dcp.load(wanted, storage_reader=reader, process_group=self._world.control)
        return empty

    def _block(self, name: str) -> tuple[slice, ...]:
        return part(self._row(name), self._world).block

    def _row(self, name: str) -> Parameter:
        for kind in (FIRST, SECOND):
            name = name.removeprefix(f"{kind}.")
        return self._rows[name]


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error}",
        hint=f"move {path.parent} away; --resume then continues from the state before it",
    )


def stored_tensors(folder: Path, kind: str) -> Mapping[str, Tensor]:
    """The whole "weights" or "average" of a state, whoever wrote it."""
    if is_sharded(folder):
        return StoredTensors(folder / kind)
    return load_file(folder / f"{kind}.safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a folder that ranks wrote, each read whole when it is asked for: a model larger than memory can be
    exported from them."""

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        found = self._reader.read_metadata().state_dict_metadata
        self._facts = {name: facts for name, facts in found.items() if isinstance(facts, TensorStorageMetadata)}
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._last:  # a stack of experts is asked for once an expert
            facts = self._facts[name]
            self._last = {name: torch.empty(facts.size, dtype=facts.properties.dtype)}
            _load_alone(self._last, self._reader)
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


def _load_alone(tensors: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
    with warnings.catch_warnings():
        # "assuming the intent is to load in a single process": it is.
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)

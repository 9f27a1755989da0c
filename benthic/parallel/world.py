"""The processes of a run: who this one is, its meshes, and the sums over all of them. One process alone has neither
meshes nor collectives, and every method hands back what it was given."""

from __future__ import annotations

import copy
import datetime
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.log import logger
from benthic.parallel.faults import one_speaks
from benthic.parallel.mesh import DENSE_AXES, EXPERT_AXES, SEQUENCE_AXES, Seat, description, require_supported
from benthic.parallel.pulse import beating
from benthic.parallel.sequence import Share

TIMEOUT = datetime.timedelta(minutes=5)
"""How long a collective of an update waits for a rank that is alive and silent; a dead one is noticed at once."""
PATIENCE = datetime.timedelta(hours=2)
"""The same between updates, where one rank may tokenise a corpus or write a model while the others wait."""


def started_processes() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class World(Seat):
    """This process among those of the run; `rank` 0 writes files and speaks."""

    def __init__(self, layout: ParallelConfig, device: torch.device, stages: Sequence[range] = ()) -> None:
        super().__init__(layout, dist.get_rank() if layout.world > 1 else 0, stages)
        self.device = device
        self.dense: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        self.storage: DeviceMesh | None = None
        """The ranks of a stage in the order in which dense parameters are cut: by tensor ranks, then by shards."""
        self.control: dist.ProcessGroup | None = None
        if self.size > 1:
            # Words between hosts go through their network, so that no GPU is waited for.
            backend = "fake" if dist.get_backend() == "fake" else "gloo"
            self.control = cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=PATIENCE))
            self.dense = init_device_mesh(device.type, self.grid.dense, mesh_dim_names=DENSE_AXES)
            self.experts = init_device_mesh(device.type, self.grid.experts, mesh_dim_names=EXPERT_AXES)
            stage = torch.arange(self.size).view(self.grid.dense)[self.grid.dense_place(self.rank)[0]]
            names = ("replicate", "tensor", "shard")
            self.storage = DeviceMesh(device.type, stage.mT, mesh_dim_names=names, _init_backend=False)
        self._sequences: dict[str, dist.ProcessGroup] = {}
        if layout.context > 1 or layout.tensor > 1:
            mesh = init_device_mesh(device.type, self.grid.sequences, mesh_dim_names=SEQUENCE_AXES)
            self._sequences = {axis: mesh[axis].get_group() for axis in ("context", "tensor") if mesh[axis].size() > 1}

    def share(self, length: int) -> Share | None:
        """As Seat's, with the context ranks as processes."""
        found = super().share(length)
        return None if found is None else replace(found, group=self._sequences.get("context"))

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that have the other heads, columns and words, None where this one has all."""
        return self._sequences.get("tensor")

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def aside(self) -> World:
        """The same world, whose words between hosts do not mix with those of this one: for another thread."""
        other = copy.copy(self)
        if self.size > 1:
            other.control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        return other

    def add_up(self, *tensors: Tensor) -> None:
        """Sum each tensor over all ranks, in place; one message for all of a type."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors) if self.size > 1 else ():
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            joined = torch.cat([tensor.flatten() for tensor in alike])
            dist.all_reduce(joined)
            for tensor, total in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def add_up_sequences(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that each have a part of the same sequences, in place."""
        for group in self._sequences.values():
            dist.all_reduce(tensor, group=group)
        return tensor

    def add_up_tensor_ranks(self, *tensors: Tensor) -> None:
        """Sum each tensor over the tensor ranks, in place, as one message; all are of one type."""
        if self.tensor_group is None or not tensors:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(joined, group=self.tensor_group)
        for tensor, total in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
        return bool(seen)

    def first_true(self, flag: bool) -> int | None:
        """The lowest rank whose flag is set, None if none is."""
        seen = torch.tensor(self.rank if flag else self.size)
        if self.size > 1:
            dist.all_reduce(seen, dist.ReduceOp.MIN, group=self.control)
        return int(seen) if int(seen) < self.size else None

    def wait_for_all(self) -> None:
        """Go on when every rank has come this far. What torch raises otherwise names the ranks that have not."""
        if self.size > 1:
            dist.monitored_barrier(self.control, timeout=PATIENCE, wait_all_ranks=True)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """What is inside runs on rank 0, then on the others, which find what it made."""
        if not self.leads:
            self.wait_for_all()
        try:
            yield
        finally:
            if self.leads:
                self.wait_for_all()

    def joint_norm(self, norms: Mapping[int, Tensor]) -> Tensor:
        """The norm, on all ranks, of what is spread over them as parameters are: float32 scalar. From this rank's
        norm of its blocks, by how many ranks hold the same numbers: each gives its share."""
        total = torch.zeros((), device=self.device)
        for copies, norm in norms.items():
            total += norm.square() / copies
        self.add_up(total)
        return total.sqrt()

    def total(self, number: int) -> int:
        """The sum of a number of each rank; no GPU is waited for."""
        if self.size == 1:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.control)
        return int(total)

    def total_of_batch(self, number: int) -> int:
        """The sum of a number over the shares of a batch, each of which all ranks that work on it have read."""
        return self.total(number) * self.layout.data // self.size

    def leaders(self, number: int) -> int:
        """Rank 0's `number`, on every rank."""
        return self.total(number if self.leads else 0)


ALONE = World(ParallelConfig(), torch.device("cpu"))
"""One process, on whatever device."""


@contextmanager
def joined(
    layout: ParallelConfig, model: ModelConfig, device: torch.device, stages: Sequence[range] = ()
) -> Iterator[World]:
    """The world of a run that torchrun started; alone, nothing is joined. `stages` are the layers of each stage of a
    pipeline. Raises ConfigError for a layout that does not fit. Leaves the others on the way out."""
    processes = started_processes()
    if processes == 1:
        require_supported(layout, model, processes)
        yield World(layout, device, stages)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        raise ConfigError("this process is part of a process group already")
    shared, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives the processes it starts again: what the last ones wrote is not for these.
    store = dist.PrefixStore(f"benthic/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    backend = "nccl" if device.type == "cuda" else "gloo"
    level = logger.level
    try:
        connection = store.clone()  # pyrefly: ignore[missing-attribute]  the stubs lack it
        with one_speaks(store, rank, size), beating(connection, rank, size):
            require_supported(layout, model, processes)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
            world = World(layout, device, stages)
            if not world.leads:
                logger.setLevel(logging.WARNING)
            logger.info("layout %s: %s", layout, description(layout, model))
            yield world
    finally:
        logger.setLevel(level)
        if dist.is_initialized():
            dist.destroy_process_group()

"""One arm of the scaling benchmark, the process of one rank: full updates under torchrun, as the trainer makes them.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.weak_scaling_arm bf16 fsdp=2,ep=2 2 two.json

First come some updates whose batch and weights are the same under every layout, by which layouts are compared; then, as
warm-up and timed, updates of `arm.batch` sequences on every rank. Weights are drawn on the device.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.train_arm import GIB, timed_steps
from benchmarks.train_arms import ARMS, Arm, train_config
from benthic.config.manifest import parameters
from benthic.config.parallel import ParallelConfig
from benthic.config.train import TrainConfig
from benthic.data import Batch
from benthic.files import write_atomic
from benthic.log import logger, to_stderr
from benthic.model.language_model import LanguageModel
from benthic.parallel.exchange import Splits, exchanged
from benthic.parallel.placement import local, parts
from benthic.parallel.world import World, joined
from benthic.train.balance import max_violation
from benthic.train.distributed import build_model, compute_dtype, own_device
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place
from benthic.train.step import Launched, Update, finish, launch

COMPARED = 3
"""Updates by which layouts are compared."""
NVLINK = 450e9
"""Bytes a second one way between two H100 or H200 GPUs: 18 links of 25 GB/s (NVIDIA's data sheet: 900 GB/s both
ways)."""
AT_ONCE = 10
"""Exchanges timed together, so that the host's launches are hidden."""


def measure(arm: Arm, layout: str, ranks: int, kind: str) -> dict[str, Any]:
    """Compare, warm up and time updates over the ranks torchrun started. `arm.batch` is a rank's; layouts of up to
    `ranks` ranks are compared with each other."""
    parallel = ParallelConfig.parse(layout)
    config = train_config(arm).replace(parallel=parallel)
    device = own_device(kind)
    with joined(parallel, config.model, device) as world:
        updates = Updates(config, arm, world, device)
        compared = [updates.on(batch) for batch in shared_batches(config, ranks, world)]
        for _ in range(arm.warm_up):
            updates.next()
        if kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, last = timed_steps(updates.next, arm.steps, kind)
        tokens = arm.batch * arm.sequence_length * parallel.data
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        found = {
            "arm": arm.model_dump(),
            "layout": str(parallel),
            "ranks": parallel.world,
            "step_seconds": {"median": middle, "first_quartile": low, "third_quartile": high, "all": seconds},
            "tokens_per_second": tokens / middle,
            "compared": [
                {
                    "loss": one.loss,
                    "gradient_norm": one.gradient_norm,
                    "loads": [load.tolist() for load in one.loads.values()],
                }
                for one in compared
            ],
            "max_violation": [round(float(max_violation(load)), 3) for load in last.loads.values()],
            "memory_gib": torch.cuda.max_memory_allocated() / GIB if kind == "cuda" else None,
        }
        if parallel.expert > 1:
            found["exchange"] = exchange_rate(config, world, kind)
        return found


class Updates:
    """Updates of this rank one after another, launched ahead on a GPU."""

    def __init__(self, config: TrainConfig, arm: Arm, world: World, device: torch.device) -> None:
        self._config, self._arm, self._world, self._device = config, arm, world, device
        self._model, _ = build_model(config, world, device)
        fill(self._model, config, world)
        self._optimizer = Optimizer(self._model, config.optimizer, config.precision.moments, world=world)
        self._stream = torch.Generator().manual_seed(config.seed + 1 + world.rank)
        self._failures = Path(tempfile.gettempdir()) / "benthic-bench-failures"
        self._number = 0
        self._ahead: Launched | None = None

    def on(self, batch: Batch) -> Update:
        """One on `batch`, waited for."""
        return finish(self._launch(batch, None), self._failures, self._world)

    def next(self) -> Update:
        """The next on a batch of this rank's own; on a GPU the one after it is launched before this one is waited
        for."""
        launched = self._ahead or self._launch(self._batch(), None)
        self._ahead = self._launch(self._batch(), launched) if self._device.type == "cuda" else None
        return finish(launched, self._failures, self._world)

    def _launch(self, batch: Batch, before: Launched | None) -> Launched:
        self._number += 1
        tokens = self._arm.batch * self._arm.sequence_length * self._config.parallel.data
        place = Place(self._number, (self._number - 1) * tokens, self._config.steps)
        return launch(self._model, self._optimizer, batch, place, self._config, before, self._world)

    def _batch(self) -> Batch:
        shape = self._arm.batch, self._arm.sequence_length + 1
        tokens = torch.randint(self._config.model.vocab_size, shape, generator=self._stream)
        return Batch(tokens, torch.zeros_like(tokens))


def shared_batches(config: TrainConfig, ranks: int, world: World) -> list[Batch]:
    """This rank's shares of batches that are the same under every layout of up to `ranks` ranks."""
    stream = torch.Generator().manual_seed(config.seed)
    shape = COMPARED, ranks * config.batch.micro_sequences, config.data.sequence_length + 1
    every = torch.randint(config.model.vocab_size, shape, generator=stream)
    return [Batch(one, torch.zeros_like(one)) for one in every.chunk(world.layout.data, 1)[world.data_rank]]


@torch.no_grad()
def fill(model: LanguageModel, config: TrainConfig, world: World) -> None:
    """First values as the manifest says, each tensor drawn whole on the device and cut to this rank's block: the same
    under every layout."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = parts(config.model, world)
    for row in parameters(config.model):
        block = local(tensors[row.name])
        if row.initialisation != "normal":
            block.fill_(1.0 if row.initialisation == "ones" else 0.0)
            continue
        stream = torch.Generator(block.device).manual_seed(zlib.crc32(f"{config.seed}/{row.name}".encode()))
        drawn = torch.randn(row.shape, generator=stream, device=block.device).mul_(config.model.initializer_range)
        block.copy_(drawn[held[row.name].block].to(compute_dtype(config)))


def exchange_rate(config: TrainConfig, world: World, kind: str) -> dict[str, float]:
    """One dispatch of a rank's tokens, each to every rank of its group, as nearly all of them go where a rank holds
    many experts: GB/s that leave a rank for others, with quartiles; and its share of NVLink's."""
    assert world.experts is not None
    group: dist.ProcessGroup = world.experts["expert"].get_group()
    ranks, tokens = group.size(), config.batch.micro_sequences * config.data.sequence_length
    rows = torch.zeros(tokens * ranks, config.model.hidden_size, dtype=torch.bfloat16, device=world.device)
    splits = Splits(group, [tokens] * ranks, [tokens] * ranks, tokens * ranks)

    @torch.no_grad()
    def exchange() -> None:
        for _ in range(AT_ONCE):
            exchanged(rows, splits)

    exchange()
    seconds, _ = timed_steps(exchange, 10, kind)
    away = AT_ONCE * rows.nbytes * (ranks - 1) / ranks
    slow, middle, fast = quantiles([away / one for one in seconds], n=4, method="inclusive")
    found = {
        "bytes_away": away / AT_ONCE,
        "gigabytes_per_second": middle / 1e9,
        "first_quartile": slow / 1e9,
        "third_quartile": fast / 1e9,
    }
    if kind == "cuda":
        copied = copy_rate(rows, world)
        found |= {"share_of_nvlink": middle / NVLINK, "copy_gigabytes_per_second": copied / 1e9}
    return found


def copy_rate(rows: Tensor, world: World) -> float:
    """Bytes a second of a plain copy to the neighbour's GPU, the others waiting: what the link itself gives."""
    there = torch.device("cuda", (world.device.index + 1) % torch.cuda.device_count())
    rate = 0.0
    if world.leads:
        target = torch.empty_like(rows, device=there)
        target.copy_(rows)
        seconds, _ = timed_steps(lambda: [target.copy_(rows) for _ in range(AT_ONCE)], 10, "cuda")
        rate = AT_ONCE * rows.nbytes / sorted(seconds)[len(seconds) // 2]
    world.wait_for_all()
    return rate


def main(arm: str, layout: str, ranks: str, kept: str) -> None:
    """The process of one rank; rank 0 keeps the result."""
    to_stderr()
    found = measure(ARMS[arm], layout, int(ranks), "cuda")
    if own_device("cuda").index in (0, None):
        machine = describe(("torch", "triton")) | {"gpu": torch.cuda.get_device_name()}
        write_atomic(Path(kept), json.dumps({"machine": machine} | found) + "\n")
        logger.info("%s on %d: %.0f tokens/s", arm, found["ranks"], found["tokens_per_second"])


if __name__ == "__main__":
    main(*sys.argv[1:])

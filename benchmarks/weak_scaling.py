"""Full updates on several GPUs of one host, each with as many tokens as one GPU has alone; and the exchange by itself.

    torchrun --standalone --nproc-per-node 1 -m benchmarks.weak_scaling bf16 "" one.json
    torchrun --standalone --nproc-per-node 2 -m benchmarks.weak_scaling bf16 fsdp=2,ep=2 two.json

The second's `tokens_per_second`, divided by twice the first's, is the weak-scaling efficiency. Arms are those of
train_arms.py, layouts as `ParallelConfig.parse` reads them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

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
from benthic.parallel.placement import local
from benthic.parallel.world import World, joined
from benthic.train.balance import max_violation
from benthic.train.distributed import build_model, own_device
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place
from benthic.train.step import Launched, Update, finish, launch


def measure(arm: Arm, layout: str, kind: str) -> dict[str, Any]:
    """Warm up and time updates over the ranks torchrun started. `arm.batch` is a rank's."""
    parallel = ParallelConfig.parse(layout)
    config = train_config(arm).replace(parallel=parallel)
    device = own_device(kind)
    with joined(parallel, config.model, device) as world:
        step = make_step(config, arm, world, device)
        for _ in range(arm.warm_up):
            step()
        seconds, last = timed_steps(step, arm.steps, kind)
        tokens = arm.batch * arm.sequence_length * parallel.data
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        found = {
            "arm": arm.model_dump(),
            "layout": str(parallel),
            "ranks": parallel.world,
            "step_seconds": {"median": middle, "first_quartile": low, "third_quartile": high},
            "tokens_per_second": tokens / middle,
            "loss": last.loss,
            "max_violation": [round(float(max_violation(load)), 3) for load in last.loads.values()],
            "memory_gib": torch.cuda.max_memory_allocated() / GIB if kind == "cuda" else None,
        }
        if parallel.expert > 1:
            found["exchange"] = exchange_rate(config, world, kind)
        return found


def make_step(config: TrainConfig, arm: Arm, world: World, device: torch.device) -> Callable[[], Update]:
    """A function that makes the next update of this rank, on a new batch each time, launched ahead on a GPU."""
    model = build_model(config, world, device)
    fill(model, config.seed + world.rank)
    moments = config.precision.moments
    optimizer = Optimizer(model, config.optimizer, moments, world=world)
    stream = torch.Generator().manual_seed(config.seed + world.rank)
    failures = Path(tempfile.gettempdir()) / "benthic-bench-failures"
    ahead: Launched | None = None

    def begin(before: Launched | None) -> Launched:
        tokens = torch.randint(config.model.vocab_size, (arm.batch, arm.sequence_length + 1), generator=stream)
        number = 1 if before is None else before.place.step + 1
        place = Place(number, (number - 1) * arm.batch * arm.sequence_length * config.parallel.data, config.steps)
        batch = Batch(tokens, torch.zeros_like(tokens))
        return launch(model, optimizer, batch, place, config, before, world)

    def step() -> Update:
        nonlocal ahead
        launched = ahead or begin(None)
        ahead = begin(launched) if device.type == "cuda" else None
        return finish(launched, failures, world)

    return step


@torch.no_grad()
def fill(model: LanguageModel, seed: int) -> None:
    """First values as the manifest says, drawn where this rank's blocks are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.manual_seed(seed)
    for row in parameters(model.config):
        block = local(tensors[row.name])
        if row.initialisation == "normal":
            block.normal_(std=model.config.initializer_range)
        else:
            block.fill_(1.0 if row.initialisation == "ones" else 0.0)


def exchange_rate(config: TrainConfig, world: World, kind: str) -> dict[str, float]:
    """One dispatch of a rank's rows, evenly to all ranks of its group: GB/s that leave a rank for others, median."""
    assert world.experts is not None
    group: dist.ProcessGroup = world.experts["expert"].get_group()
    ranks = group.size()
    choices = config.batch.micro_sequences * config.data.sequence_length * config.model.num_experts_per_tok
    piece = choices // ranks
    rows = torch.zeros(piece * ranks, config.model.hidden_size, dtype=torch.bfloat16, device=world.device)
    splits = Splits(group, [piece] * ranks, [piece] * ranks, piece * ranks)
    with torch.no_grad():
        for _ in range(3):
            exchanged(rows, splits)
        seconds, _ = timed_steps(lambda: exchanged(rows, splits), 10, kind)
    away = rows.nbytes * (ranks - 1) / ranks
    return {"bytes_away": away, "seconds": median(seconds), "gigabytes_per_second": away / median(seconds) / 1e9}


def main(arm: str, layout: str, kept: str) -> None:
    """The process of one rank; rank 0 keeps the result."""
    to_stderr()
    found = {"machine": describe(("torch", "triton"))} | measure(ARMS[arm], layout, "cuda")
    if own_device("cuda").index in (0, None):
        write_atomic(Path(kept), json.dumps(found, indent=1) + "\n")
        logger.info("%s on %d: %.0f tokens/s", arm, found["ranks"], found["tokens_per_second"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A layout of thousands of ranks, tried in one process: the model itself on the meta device, cut as its ranks cut it.

What is checked: that the blocks of all ranks make up every tensor exactly; that ranks built by FSDP, on a process group
that sends nothing, hold what the arithmetic says; that what a rank keeps between updates is what the planner counted;
and that in an exchange of tokens every send has its receive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benthic.config.manifest import Parameter, parameters
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, NumericsError
from benthic.model.language_model import LanguageModel
from benthic.ops.route import route
from benthic.parallel.experts import without_repeats
from benthic.parallel.mesh import Seat, description, require_supported
from benthic.parallel.placement import local, part, parts
from benthic.parallel.world import World
from benthic.plan.devices import find_device
from benthic.plan.memory import training_memory
from benthic.train.distributed import check_batches, check_pipeline, laid_out, stage_layers
from benthic.train.fit import training_of

TOLERANCE = 0.05
"""By which the planner's bytes of what stays may differ from what ranks hold."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One dispatch of an expert layer, of one group of expert ranks: rows a rank sends to others on average, the most
    rows that one gets, and the bytes of a row."""

    sent: float
    most_received: int
    row_bytes: int


def simulate(config: TrainConfig) -> Iterator[str]:
    """Check the layout of `config` and say what was found, line by line. Raises ConfigError for a layout that does not
    fit and NumericsError where a check fails."""
    layout, model = config.parallel, config.model
    require_supported(layout, model, layout.world)
    check_pipeline(config)
    check_batches(config)
    yield f"layout {layout}: {description(layout, model)}"
    rows = list(parameters(model))
    stages = stage_layers(config)
    seats = [Seat(layout, rank, stages) for rank in range(layout.world)]
    if stages:
        yield f"stages: layers {' | '.join(f'{layers.start}-{layers.stop - 1}' for layers in stages)}"
    for place in range(layout.pipeline):
        there = [seat for seat in seats if seat.pipeline_rank == place]
        for row in _kinds([row for row in rows if there[0].holds(row)]):
            _require_tiled(row, there)
    held = [row.name for seat in seats[:: layout.ranks_in_stage] for row in rows if seat.holds(row)]
    if sorted(held) != sorted(row.name for row in rows):
        raise NumericsError(f"the stages of the pipeline hold {len(held):,} tensors, the model has {len(rows):,}")
    yield f"blocks: {len(rows):,} tensors are made up by their blocks exactly, over {layout.world:,} ranks"
    built = sorted({0, layout.world // 2, layout.world - 1})
    for rank in built:
        _require_built(config, rank, stages)
    yield f"ranks {', '.join(map(str, built))} built by FSDP hold the blocks they should"
    yield _compared_with_plan(config, rows, seats)
    if layout.expert > 1:
        found = exchange(config)
        yield (
            f"exchange: {found.sent:,.0f} rows of {found.row_bytes:,} bytes leave a rank for others in a dispatch, the "
            f"fullest rank of a group gets {found.most_received:,}; every send has its receive"
        )


def _kinds(rows: list[Parameter]) -> list[Parameter]:
    """One row of every shape that is cut in its own way."""
    return list({(row.shape, row.part == "routed", row.group == "routing_bias"): row for row in rows}.values())


def _require_tiled(row: Parameter, seats: list[Seat]) -> None:
    holders: dict[tuple, int] = {}
    for seat in seats:
        block = part(row, seat)
        if all(block.size):
            holders[block.start, block.size] = holders.get((block.start, block.size), 0) + 1
    covered = sum(prod(size) for _, size in holders)
    starts = {start for start, _ in holders}
    if covered != row.size or len(starts) != len(holders) or len(set(holders.values())) != 1:
        raise NumericsError(f"the blocks of {row.name} cover {covered:,} of {row.size:,} elements, or some twice")


def _require_built(config: TrainConfig, rank: int, stages: Sequence[range]) -> None:
    layout, model = config.parallel, config.model
    if dist.is_initialized():
        raise ConfigError("a layout is simulated by a process that is part of none")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        world = World(layout, torch.device("cpu"), stages)
        built = LanguageModel(model, torch.device("meta"), torch.float32)
        laid_out(built, config, world, torch.bfloat16)
        expected = parts(model, world)
        found = dict(built.named_parameters())
        wanted = {row.name for row in parameters(model) if row.name in expected and row.group != "routing_bias"}
        if found.keys() != wanted:
            raise NumericsError(f"rank {rank} has built {len(found)} tensors; it should hold {len(wanted)}")
        for name, parameter in found.items():
            if tuple(local(parameter).shape) != expected[name].size:
                shape = list(local(parameter).shape)
                raise NumericsError(f"rank {rank} holds {shape} of {name}; its block is {list(expected[name].size)}")
    finally:
        dist.destroy_process_group()


def _compared_with_plan(config: TrainConfig, rows: list[Parameter], seats: list[Seat]) -> str:
    compute = "bfloat16" if config.precision.compute == "auto" else config.precision.compute
    training = training_of(config, compute)
    stages = seats[0].stages or None
    planned = training_memory(config.model, training, config.parallel, stages, find_device("h100"))
    mine = [seat for seat in seats if seat.pipeline_rank == planned.rank]
    states = 4 + 2 * (2 if training.bf16_moments else 4) + 4 * training.averaged_weights
    fullest = max(_held(rows, seat) for seat in (mine[0], mine[-1]))
    # Weights in float32 are their own masters.
    masters = "weights" if training.precision == "fp32" else "master weights"
    expected = sum(line.value for line in planned.lines if line.name in (masters, "moments", "averaged weights"))
    difference = fullest * states / expected - 1
    told = (
        f"memory: what updates need takes {fullest * states / 2**30:.2f} GiB on the fullest rank, planned "
        f"{expected / 2**30:.2f} GiB ({difference:+.1%})"
    )
    if abs(difference) > TOLERANCE:
        raise NumericsError(f"{told}: more than {TOLERANCE:.0%} apart")
    return f"{told}; {planned.total / 2**30:.1f} GiB planned with all that comes and goes"


def _held(rows: list[Parameter], seat: Seat) -> int:
    return sum(prod(part(row, seat).size) for row in rows if row.group != "routing_bias" and seat.holds(row))


@torch.no_grad()
def exchange(config: TrainConfig) -> Exchange:
    """Dispatch a micro-batch of every rank of one group, routed by the model's rule from random scores."""
    model, ranks = config.model, config.parallel.expert
    tokens = config.batch.micro_sequences * config.data.sequence_length
    stream = torch.Generator().manual_seed(config.seed)
    bias = torch.zeros(model.n_routed_experts) if model.has_routing_bias else None
    held = model.n_routed_experts // ranks
    sent = torch.zeros(ranks, ranks, dtype=torch.int64)
    received = torch.zeros(ranks, ranks, dtype=torch.int64)
    for rank in range(ranks):
        chosen = route(torch.randn(tokens, model.n_routed_experts, generator=stream), bias, model).experts
        towards = without_repeats(chosen // held)
        sent[rank] = towards[towards >= 0].bincount(minlength=ranks)
        # What each rank gets: the tokens that chose any of its experts.
        for other in range(ranks):
            received[other, rank] = (chosen // held == other).any(1).sum()
    if not torch.equal(sent, received.t()):
        raise NumericsError("rows that are sent in an exchange are not those that are received")
    away = float(sent.sum() - sent.diagonal().sum()) / ranks
    width = model.hidden_size
    narrow = config.precision.compute == "float8"
    row_bytes = width + 4 * -(-width // 128) if narrow else 2 * width
    return Exchange(away, int(received.sum(1).max()), row_bytes)

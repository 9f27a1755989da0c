"""A layout of thousands of ranks, tried in one process: the model itself on the meta device, cut as its ranks cut it.

What is checked: that the blocks of all ranks make up every tensor exactly; that ranks built by FSDP, on a process group
that sends nothing, hold what the arithmetic says; that what each kind of rank keeps between micro-batches is what the
planner counted; that a pipeline's sends and receives match and come in an order that ends; that in an exchange of
tokens every send has its receive. And what a rank sends in an update is told, with the planner's figures beside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benthic.config.manifest import Parameter, parameters
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, NumericsError
from benthic.log import logger
from benthic.model.language_model import LanguageModel
from benthic.parallel.mesh import Seat, description, require_supported
from benthic.parallel.placement import copies, local, part, parts
from benthic.parallel.world import World
from benthic.plan.holdings import stages_of_rank
from benthic.plan.memory import kinds_of_ranks
from benthic.plan.pipeline import cut_layers
from benthic.train.distributed import (
    check_batches,
    check_pipeline,
    compute_dtype,
    cut_model,
    sequences_at_a_time,
    stage_layers,
)
from benthic.train.schedule import smallest
from benthic.train.simulated_memory import kept
from benthic.train.simulated_messages import Exchange, exchange, synchronisation
from benthic.train.simulated_pipeline import (
    Events,
    events_of,
    messages_sent,
    require_matching,
    require_progress,
)
from benthic.train.simulation_tables import Tried, memory_table, message_bytes, traffic_table

if TYPE_CHECKING:  # torch's pipelining takes a while to import
    from benthic.train.pipeline import Section


def simulate(config: TrainConfig) -> Iterator[str]:
    """Check the layout of `config` and say what was found, line by line. Raises ConfigError for a layout that does not
    fit and NumericsError, which names a rank or a tensor, where a check fails."""
    begun = time.monotonic()
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
    cut = stages or tuple(cut_layers(model, [1.0] * (model.num_hidden_layers + model.num_nextn_predict_layers), 1))
    places = kinds_of_ranks(model, layout, cut)
    first = {
        place: _try(config, place * layout.ranks_in_stage, stages, len(alike) * layout.ranks_in_stage)
        for place, alike in places.items()
    }
    last = sorted({layout.world // 2, layout.world - 1} - {one.rank for one in first.values()})
    for rank in last:
        _try(config, rank, stages, 1)
    built = ", ".join(map(str, sorted({*last, *(one.rank for one in first.values())})))
    yield f"ranks {built} built by FSDP hold the blocks they should"
    yield from memory_table(config, cut, first)
    if stages:
        yield from _pipeline(config, stages, first[0].programs)
    found = exchange(config) if layout.expert > 1 else None
    if found is not None:
        yield _told(found)
    yield from traffic_table(config, cut, first, counts(config)[-1], found)
    yield f"simulated in {time.monotonic() - begun:.0f} s, in one process"


def _kinds(rows: list[Parameter]) -> list[Parameter]:
    """One row of every shape that is cut in its own way."""

    def cut(row: Parameter) -> tuple:
        return row.shape, row.part == "routed", row.group == "routing_bias", row.shard_axis

    return list({cut(row): row for row in rows}.values())


def _require_tiled(row: Parameter, seats: list[Seat]) -> None:
    holders: dict[tuple, list[int]] = {}
    for seat in seats:
        block = part(row, seat)
        if all(block.size):
            holders.setdefault((block.start, block.size), []).append(seat.rank)
    covered = sum(prod(size) for _, size in holders)
    starts = {start for start, _ in holders}
    if covered != row.size or len(starts) != len(holders):
        raise NumericsError(f"the blocks of {row.name} cover {covered:,} of {row.size:,} elements, or some twice")
    expected = len(seats) if row.group == "routing_bias" else copies(row, seats[0])
    for (start, _), ranks in holders.items():
        if len(ranks) != expected:
            raise NumericsError(
                f"the block of {row.name} that starts at {list(start)} is on {len(ranks)} ranks, first {ranks[0]}; it "
                f"should be on {expected}"
            )


@contextmanager
def _pretending(rank: int, size: int) -> Iterator[None]:
    """Inside, this process is one of many that never answer, and says less than a run would."""
    if dist.is_initialized():
        raise ConfigError("a layout is simulated by a process that is part of none")
    level = logger.level
    logger.setLevel(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        logger.setLevel(level)


def _try(config: TrainConfig, rank: int, stages: Sequence[range], alike: int) -> Tried:
    with _pretending(rank, config.parallel.world):
        world = World(config.parallel, torch.device("cpu"), stages)
        built, sections, in_float8 = cut_model(config, world)
        _require_blocks(built, config, world)
        programs = _programs(config, sections, world)
        sent = synchronisation(built.parameters(), config, counts(config)[-1])
        return Tried(rank, alike, kept(built, config, world, in_float8), sent, programs)


def programs_of(config: TrainConfig) -> dict[int, dict[int, Events]]:
    """What each rank of a pipeline does in the smallest and in the largest update, by its number of micro-batches."""
    stages = stage_layers(config)
    with _pretending(0, config.parallel.world):
        world = World(config.parallel, torch.device("cpu"), stages)
        _, sections, _ = cut_model(config, world)
        return _programs(config, sections, world)


def _programs(config: TrainConfig, sections: Mapping[int, Section], world: World) -> dict[int, dict[int, Events]]:
    if not sections:
        return {}
    from benthic.train.pipeline import Pipeline

    pipeline = Pipeline(config, dict(sections), compute_dtype(config), world)
    return {
        count: events_of(pipeline.schedule(count), config.parallel.schedule_for(count), pipeline.owner)
        for count in counts(config)
    }


def counts(config: TrainConfig) -> list[int]:
    """Micro-batches a rank of the smallest and of the largest update."""
    unit = sequences_at_a_time(config)
    share = config.batch.micro_sequences * config.parallel.data
    least = max(1, int(smallest(config.batch.sequences)) // unit) * unit
    return sorted({least // share, int(config.batch.sequences.peak) // share})


def _require_blocks(built: LanguageModel, config: TrainConfig, world: World) -> None:
    expected, rank = parts(config.model, world), world.rank
    found = dict(built.named_parameters())
    wanted = {row.name for row in parameters(config.model) if row.name in expected and row.group != "routing_bias"}
    if found.keys() != wanted:
        other = sorted(found.keys() ^ wanted)[0]
        raise NumericsError(f"rank {rank} has built {len(found)} tensors; it should hold {len(wanted)}; first {other}")
    for name, parameter in found.items():
        if tuple(local(parameter).shape) != expected[name].size:
            shape = list(local(parameter).shape)
            raise NumericsError(f"rank {rank} holds {shape} of {name}; its block is {list(expected[name].size)}")


def _pipeline(config: TrainConfig, stages: Sequence[range], programs: dict[int, dict[int, Events]]) -> Iterator[str]:
    layout = config.parallel
    owners = {stage: place for place in range(layout.pipeline) for stage in stages_of_rank(layout, place)}
    for count, events in programs.items():
        require_matching(events, owners, count)
        require_progress(events, len(stages))
        messages = sum(map(messages_sent, events.values()))
        yield (
            f"pipeline: {count} micro-batches a rank under {layout.schedule_for(count)} are {messages:,} messages of "
            f"{message_bytes(config):,} bytes between its ranks; each is received, and their order comes to an end"
        )


def _told(found: Exchange) -> str:
    rows = ", ".join(f"{size:,.0f} of {what}" for what, size in found.row_bytes.items())
    return (
        f"exchange: {found.sent:,.0f} rows leave a rank for others in a layer and micro-batch, the fullest rank of a "
        f"group gets {found.most_received:,}; every send has its receive; bytes a row: {rows}"
    )

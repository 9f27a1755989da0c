"""A layout of thousands of ranks, tried in one process: the model itself on the meta device, cut as its ranks cut it.

What is checked: that the blocks of all ranks make up every tensor exactly; that ranks built by FSDP, on a process group
that sends nothing, hold what the arithmetic says; that what each kind of rank keeps between micro-batches is what the
planner counted; that a pipeline's sends and receives match and come in an order that ends; that in an exchange of
tokens every send has its receive. And what a rank sends in an update is told, with the planner's figures beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benthic.config.manifest import Parameter, parameters
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, NumericsError
from benthic.model.language_model import LanguageModel
from benthic.parallel.mesh import Seat, description, require_supported
from benthic.parallel.placement import copies, local, part, parts
from benthic.parallel.world import World
from benthic.plan.communication import border_bytes, expert_exchange, synchronisation_bytes
from benthic.plan.devices import find_device
from benthic.plan.holdings import pipeline_rank
from benthic.plan.memory import kinds_of_ranks, memory_of_rank, standing_memory
from benthic.plan.pipeline import cut_layers
from benthic.train.distributed import (
    check_batches,
    check_pipeline,
    compute_dtype,
    cut_model,
    sequences_at_a_time,
    stage_layers,
)
from benthic.train.fit import training_of
from benthic.train.schedule import smallest
from benthic.train.simulated_memory import kept
from benthic.train.simulated_messages import Synchronisation, exchange, synchronisation
from benthic.train.simulated_pipeline import Batch, Events, events_of, require_matching, require_progress

TOLERANCE = 0.05
"""By which the planner's bytes of what stays may differ from what ranks hold."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Tried:
    """A rank that was built: what it keeps, what it sends to copies, and, in a pipeline, what all places do in the
    largest and in the smallest update by its number of micro-batches."""

    rank: int
    kept: dict[str, float]
    synchronisation: Synchronisation
    programs: dict[int, dict[int, Events]]


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
    first = {place: _try(config, place * layout.ranks_in_stage, stages) for place in places}
    last = sorted({layout.world // 2, layout.world - 1} - {one.rank for one in first.values()})
    for rank in last:
        _try(config, rank, stages)
    built = ", ".join(map(str, sorted({*last, *(one.rank for one in first.values())})))
    yield f"ranks {built} built by FSDP hold the blocks they should"
    yield from _memory(config, cut, first)
    if layout.pipeline > 1:
        yield from _pipeline(config, stages, first[places[0]].programs)
    yield from _sent(config, cut, first)
    yield f"all of it in {time.monotonic() - begun:.0f} s, in one process"


def _kinds(rows: list[Parameter]) -> list[Parameter]:
    """One row of every shape that is cut in its own way."""
    return list(
        {(row.shape, row.part == "routed", row.group == "routing_bias", row.shard_axis): row for row in rows}.values()
    )


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
    """Inside, this process is one of many that never answer."""
    if dist.is_initialized():
        raise ConfigError("a layout is simulated by a process that is part of none")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _try(config: TrainConfig, rank: int, stages: Sequence[range]) -> Tried:
    with _pretending(rank, config.parallel.world):
        world = World(config.parallel, torch.device("cpu"), stages)
        built, sections, in_float8 = cut_model(config, world)
        _require_blocks(built, config, world)
        programs: dict[int, dict[int, Events]] = {}
        if sections:
            from benthic.train.pipeline import Pipeline

            pipeline = Pipeline(config, sections, compute_dtype(config), world)
            for count in counts(config):
                schedule, name = pipeline.schedule(count), config.parallel.schedule_for(count)
                programs[count] = events_of(schedule, name, pipeline.owner)
        sent = synchronisation(built.parameters(), config, counts(config)[-1])
        return Tried(rank, kept(built, config, world, in_float8), sent, programs)


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


def _memory(config: TrainConfig, cut: Sequence[range], tried: dict[int, Tried]) -> Iterator[str]:
    """What each kind of rank keeps, the planner's bytes beside it."""
    training, layout, model = training_of(config, _compute(config)), config.parallel, config.model
    yield (
        "memory a rank keeps, GiB   weights     FP8  masters  moments  average  gradients    total  planned  apart"
        "   with activations"
    )
    for place, one in tried.items():
        planned = standing_memory(model, training, layout, cut, place)
        names = (
            "weights",
            "weights in FP8, both ways round",
            "master weights",
            "moments",
            "averaged weights",
            "gradients",
        )
        total, expected = sum(one.kept.values()), sum(planned.values())
        whole = memory_of_rank(model, training, layout, cut, place, find_device("h100"))
        of_activations = sum(whole.by_part.get(name, 0.0) for name in ("activations", "workspace"))
        apart = total / expected - 1
        yield (
            f"  as rank {one.rank:<16}"
            + "".join(
                f"{one.kept.get(name, 0.0) / GIB:{width}.2f}"
                for name, width in zip(names, (10, 8, 9, 9, 9, 11), strict=True)
            )
            + f"{total / GIB:9.2f}{expected / GIB:9.2f}{apart:+7.1%}{whole.total / GIB:9.1f} ({of_activations / GIB:.1f})"
        )
        worst = max({**planned, **one.kept}, key=lambda name: abs(one.kept.get(name, 0.0) - planned.get(name, 0.0)))
        if abs(apart) > TOLERANCE:
            raise NumericsError(
                f"rank {one.rank} keeps {total / GIB:.2f} GiB, planned {expected / GIB:.2f} GiB ({apart:+.1%}, more than "
                f"{TOLERANCE:.0%}); most of it is {worst}: {one.kept.get(worst, 0.0) / GIB:.2f} GiB, planned "
                f"{planned.get(worst, 0.0) / GIB:.2f} GiB"
            )


def _compute(config: TrainConfig) -> str:
    return "bfloat16" if config.precision.compute == "auto" else config.precision.compute


def _pipeline(config: TrainConfig, stages: Sequence[range], programs: dict[int, dict[int, Events]]) -> Iterator[str]:
    layout = config.parallel
    owners = {
        index: seat
        for seat in range(layout.pipeline)
        for index in Seat(layout, seat * layout.ranks_in_stage, stages).own_stages
    }
    size = _message_bytes(config)
    for count, of_ranks in programs.items():
        require_matching(of_ranks, owners, count)
        require_progress(of_ranks, len(stages))
        sent = {
            rank: sum(len(one.sent) for one in events if isinstance(one, Batch)) for rank, events in of_ranks.items()
        }
        most = max(sent, key=lambda rank: sent[rank])
        yield (
            f"pipeline, {count} micro-batches, {layout.schedule_for(count)}: {sum(sent.values()):,} messages of "
            f"{size / 2**20:,.1f} MiB a pipeline, each with its receive, in an order that ends; place {most} sends the "
            f"most, {sent[most]:,}"
        )


def _message_bytes(config: TrainConfig) -> int:
    from benthic.model.stage import width_passed

    tokens = config.batch.micro_sequences * config.data.sequence_length
    return tokens * width_passed(config.model) * compute_dtype(config).itemsize


def _sent(config: TrainConfig, cut: Sequence[range], tried: dict[int, Tried]) -> Iterator[str]:
    """What each kind of rank sends in the largest update, the planner's bytes beside it."""
    layout, model, count = config.parallel, config.model, counts(config)[-1]
    size, h100 = compute_dtype(config).itemsize, find_device("h100")
    tokens = config.batch.micro_sequences * config.data.sequence_length
    found = exchange(config) if layout.expert > 1 else None
    planned_row = 0.0
    if found is not None:
        here = tokens / layout.context / layout.tensor
        each = [expert_exchange(model, layout, h100, row) for row in found.row_bytes.values()]
        planned_row = here * sum(one.network_bytes + one.node_bytes for one in each)
        yield (
            f"exchange: {found.sent:,.0f} rows leave a rank for others in a layer and micro-batch, the fullest gets "
            f"{found.most_received:,}; bytes a row: {', '.join(f'{what} {row:,.0f}' for what, row in found.row_bytes.items())}; "
            f"every send has its receive"
        )
    yield "sent in an update, GiB     experts  planned  pipeline  planned  gradients  planned  weights  planned     total"
    for place, one in tried.items():
        held = pipeline_rank(model, layout, cut, place)
        passes = count * (2 if config.memory.recomputation == "layer" else 1)
        layers = sum(model.is_expert_layer(layer) for layer in held.layers)
        figures = [0.0] * 4 if found is None else []
        if found is not None:
            again = passes - count
            rows = found.row_bytes["tokens"] + found.row_bytes["results"]
            figures = [layers * (count * found.bytes + again * found.sent * rows), layers * count * planned_row]
        else:
            figures = [0.0, 0.0]
        messages = 0
        if one.programs:
            messages = sum(len(event.sent) for event in one.programs[count][place] if isinstance(event, Batch))
        figures += [messages * _message_bytes(config), messages * border_bytes(model, tokens) * size / 2]
        total = held.total
        planned = [
            synchronisation_bytes(layout, ranks, size * elements, 4 * elements, count)
            for elements, ranks in (
                (total.dense, layout.replicate * layout.dense_shards),
                (total.routed, layout.expert_copies),
            )
        ]
        figures += [one.synchronisation.gradients, sum(gradients for gradients, _ in planned)]
        figures += [one.synchronisation.weights, sum(weights for _, weights in planned)]
        widths = (10, 9, 10, 9, 11, 9, 9, 9)
        yield (
            f"  as rank {one.rank:<16}"
            + "".join(f"{figure / GIB:{width}.2f}" for figure, width in zip(figures, widths, strict=True))
            + f"{sum(figures[::2]) / GIB:10.2f}"
        )

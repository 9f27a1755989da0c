"""What the ranks of a simulated world keep and send: a line for each kind of rank, the planner's figures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benthic.config.train import TrainConfig
from benthic.errors import NumericsError
from benthic.model.stage import width_passed
from benthic.plan.communication import border_bytes, expert_exchange, synchronisation_bytes
from benthic.plan.devices import find_device
from benthic.plan.holdings import pipeline_rank
from benthic.plan.memory import memory_of_rank, standing_memory
from benthic.train.distributed import compute_dtype
from benthic.train.fit import training_of
from benthic.train.simulated_messages import Exchange, Synchronisation
from benthic.train.simulated_pipeline import Events, messages_sent

TOLERANCE = 0.05
"""By which the planner's bytes of what stays may differ from what ranks hold."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
LIKE = find_device("h100")
"""The device of plans: every GPU holds the same, and its nodes have eight."""
KEPT = {
    "weights": "weights",
    "in FP8": "weights in FP8, both ways round",
    "masters": "master weights",
    "moments": "moments",
    "average": "averaged weights",
    "gradients": "gradients",
}
"""Columns, and the planner's names of what is in them."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A rank that was built, of `alike` ranks that hold as much: what it keeps by name, what it sends to copies, and,
    in a pipeline, what all places do in an update, by the number of its micro-batches."""

    rank: int
    alike: int
    kept: dict[str, float]
    synchronisation: Synchronisation
    programs: dict[int, dict[int, Events]]


def memory_table(config: TrainConfig, stages: Sequence[range], tried: Mapping[int, Tried]) -> Iterator[str]:
    """What each rank of `tried`, by its place in the pipeline, keeps between micro-batches. Raises NumericsError where
    the planner counted something else."""
    compute = "bfloat16" if config.precision.compute == "auto" else config.precision.compute
    training, layout, model = training_of(config, compute), config.parallel, config.model
    yield _line("memory that a rank keeps", *KEPT, "total", "planned", "apart", "activations", "with all")
    for place, one in tried.items():
        planned = standing_memory(model, training, layout, stages, place)
        whole = memory_of_rank(model, training, layout, stages, place, LIKE)
        total, expected = sum(one.kept.values()), sum(planned.values())
        apart = total / expected - 1
        come_and_go = sum(whole.by_part.get(part, 0.0) for part in ("activations", "workspace"))
        columns = [one.kept.get(name, 0.0) for name in KEPT.values()]
        yield _line(_name(one), *columns, total, expected, f"{apart:+.1%}", come_and_go, whole.total)
        _require_near(one, planned)
    total = sum(one.alike * sum(one.kept.values()) for one in tried.values())
    yield f"  all ranks together keep {_told(total)}"


def _require_near(one: Tried, planned: Mapping[str, float]) -> None:
    total, expected = sum(one.kept.values()), sum(planned.values())
    if abs(total / expected - 1) <= TOLERANCE:
        return
    names = {**planned, **one.kept}
    worst = max(names, key=lambda name: abs(one.kept.get(name, 0.0) - planned.get(name, 0.0)))
    held, counted = one.kept.get(worst, 0.0), planned.get(worst, 0.0)
    raise NumericsError(
        f"rank {one.rank} keeps {_told(total)}, planned {_told(expected)}: more than {TOLERANCE:.0%} apart, most of it "
        f"in {worst}, {_told(held)} and {_told(counted)}"
    )


def traffic_table(
    config: TrainConfig,
    stages: Sequence[range],
    tried: Mapping[int, Tried],
    micro_batches: int,
    exchanged: Exchange | None,
) -> Iterator[str]:
    """What each rank sends in an update of so many micro-batches: rows to experts and back, states and gradients to
    other stages, gradients and weights to copies."""
    kinds = ("experts", "pipeline", "gradients", "weights")
    sent = 0.0
    yield _line("sent in an update", *(name for kind in kinds for name in (kind, "planned")), "total")
    for place, one in tried.items():
        pairs = (
            _of_experts(config, stages, place, micro_batches, exchanged),
            _of_pipeline(config, one, place, micro_batches),
            *_of_copies(config, stages, place, micro_batches, one.synchronisation),
        )
        columns = [figure for pair in pairs for figure in pair]
        yield _line(_name(one), *columns, sum(columns[::2]))
        # Places that hold alike layers may have fewer neighbours.
        sent += one.alike * (sum(columns[::2]) - columns[2])
    programs = tried[0].programs.get(micro_batches, {})
    messages = sum(map(messages_sent, programs.values()))
    sent += config.parallel.ranks_in_stage * messages * message_bytes(config)
    yield f"  all ranks together send {_told(sent)}"


def _name(one: Tried) -> str:
    return f"  rank {one.rank}, {one.alike:,} alike"


def _line(name: str, *columns: str | float) -> str:
    shown = (column if isinstance(column, str) else _told(column) for column in columns)
    return f"{name:<26}" + "".join(f"{column:>12}" for column in shown)


def _told(size: float) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    power = min(len(UNITS) - 1, max(0, (int(size).bit_length() - 1) // 10))
    return f"{size / 2 ** (10 * power):,.{2 * (power > 0)}f} {UNITS[power]}" if size else "-"


def _of_experts(
    config: TrainConfig, stages: Sequence[range], place: int, micro_batches: int, exchanged: Exchange | None
) -> tuple[float, float]:
    if exchanged is None:
        return 0.0, 0.0
    layout, model = config.parallel, config.model
    passes = micro_batches * sum(map(model.is_expert_layer, pipeline_rank(model, layout, stages, place).layers))
    tokens = _tokens(config) / layout.context / layout.tensor
    rows = [expert_exchange(model, layout, LIKE, row) for row in exchanged.row_bytes.values()]
    planned = tokens * sum(one.network_bytes + one.node_bytes for one in rows)
    again = ("tokens", "results") if config.memory.recomputation == "layer" else ()
    repeated = exchanged.sent * sum(exchanged.row_bytes[what] for what in again)
    return passes * (exchanged.bytes + repeated), passes * planned


def _of_pipeline(config: TrainConfig, one: Tried, place: int, micro_batches: int) -> tuple[float, float]:
    if not one.programs:
        return 0.0, 0.0
    messages = messages_sent(one.programs[micro_batches][place])
    planned = border_bytes(config.model, _tokens(config)) * compute_dtype(config).itemsize / 2
    return messages * message_bytes(config), messages * planned


def message_bytes(config: TrainConfig) -> int:
    """What a stage passes on for a micro-batch, or the gradient that comes back."""
    return _tokens(config) * width_passed(config.model) * compute_dtype(config).itemsize


def _tokens(config: TrainConfig) -> int:
    return config.batch.micro_sequences * config.data.sequence_length


def _of_copies(
    config: TrainConfig, stages: Sequence[range], place: int, micro_batches: int, found: Synchronisation
) -> tuple[tuple[float, float], tuple[float, float]]:
    layout, size = config.parallel, compute_dtype(config).itemsize
    held = pipeline_rank(config.model, layout, stages, place).total
    planned = [
        synchronisation_bytes(layout, ranks, size * elements, 4 * elements, micro_batches)
        for elements, ranks in (
            (held.dense, layout.replicate * layout.dense_shards),
            (held.routed, layout.expert_copies),
        )
    ]
    gradients, weights = (sum(one[index] for one in planned) for index in (0, 1))
    return (found.gradients, gradients), (found.weights, weights)

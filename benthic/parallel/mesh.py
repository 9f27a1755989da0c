"""Which rank stands where: plain arithmetic on a ParallelConfig, no process needed.

Ranks of a pipeline stage are numbered replicate, shard, context, tensor, the last running fastest. Experts are spread
over consecutive ranks, so that the exchange, which sends most, stays inside a node as far as it can:

    shard=4, expert=2         rank      0  1  2  3
                              shard     0  1  2  3
                              experts   a  b  a  b      ranks 0 and 2 hold copies of the same experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benthic.config.manifest import Parameter
from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.parallel.sequence import Share
from benthic.plan.holdings import stages_of_rank

DENSE_AXES = ("pipeline", "replicate", "shard", "tensor")
"""The mesh of all that is no routed expert. Its shard axis takes the context ranks in: they hold the same weights."""
EXPERT_AXES = ("pipeline", "expert_replicate", "expert_shard", "expert")
"""The same ranks as routed experts see them."""
SEQUENCE_AXES = ("pipeline", "data", "context", "tensor")
"""The same ranks as sequences see them: those of one data index read the same ones."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of the meshes, in the order of their axes; each multiplies to the world."""

    dense: tuple[int, int, int, int]
    experts: tuple[int, int, int, int]
    sequences: tuple[int, int, int, int]

    def dense_place(self, rank: int) -> tuple[int, ...]:
        """Index of `rank` along DENSE_AXES."""
        return _digits(rank, self.dense)

    def expert_place(self, rank: int) -> tuple[int, ...]:
        """Index of `rank` along EXPERT_AXES."""
        return _digits(rank, self.experts)


class Seat:
    """One rank of a layout: all that decides which part of a model it holds."""

    def __init__(self, layout: ParallelConfig, rank: int, stages: Sequence[range] = ()) -> None:
        """`stages` are the layers of each stage of a pipeline, in order."""
        self.layout, self.rank = layout, rank
        self.size, self.grid = layout.world, grid(layout)
        if len(stages) != (layout.stages if layout.pipeline > 1 else 0):
            raise ConfigError(f"the layout ({layout}) has {layout.stages} stages, but {len(stages)} were given")
        self.stages = tuple(stages)
        # Stages that this rank holds, and the layers of each; none without a pipeline.
        mine = stages_of_rank(layout, self.pipeline_rank) if stages else ()
        self.own_stages = {index: self.stages[index] for index in mine}

    @property
    def pipeline_rank(self) -> int:
        """Which place of the pipeline this rank has."""
        return self.grid.dense_place(self.rank)[0]

    def holds(self, row: Parameter) -> bool:
        """Whether this rank's stages hold a tensor, or a part of it: the embedding is on the first stage, the final
        norm and the head are on the last one."""
        if not self.stages:
            return True
        if row.layer is not None:
            return any(row.layer in layers for layers in self.own_stages.values())
        return (0 if row.part == "embedding" else len(self.stages) - 1) in self.own_stages

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank reads, of `layout.data`."""
        return self.sequence_place[1]

    @property
    def sequence_place(self) -> tuple[int, ...]:
        """Index of this rank along SEQUENCE_AXES."""
        return _digits(self.rank, self.grid.sequences)

    @property
    def readers(self) -> int:
        """How many of the ranks can read texts of their own when no sequence is shared."""
        return self.layout.data * self.layout.context

    @property
    def reader(self) -> int:
        """Which of them this rank is, or belongs to."""
        _, data, context, _ = self.sequence_place
        return data * self.layout.context + context

    @property
    def shares_sequences(self) -> bool:
        """Whether ranks each have a part of the same sequences."""
        return self.layout.context > 1 or self.layout.tensor > 1

    @property
    def has_expert_mesh(self) -> bool:
        """Whether routed experts lie over ranks otherwise than all else."""
        return self.layout.expert > 1 or self.layout.tensor > 1

    def share(self, length: int) -> Share | None:
        """What this rank trains on of sequences of `length` positions; None where it is all of them."""
        layout, (_, _, context, tensor) = self.layout, self.sequence_place
        if not self.shares_sequences:
            return None
        return Share(length, layout.context, context, layout.tensor, tensor)


def grid(layout: ParallelConfig) -> Grid:
    """The meshes of a layout. Without ZeRO (`zero` 0) nothing is split, so shard ranks are replicas too.

    Copies of an expert are shards of it as far as they lie in one replica, and replicas beyond.
    """
    copies, shards = layout.expert_copies, layout.expert_shards
    replicate, shard = layout.replicate, layout.dense_shards
    if layout.zero == 0:
        replicate, shard, shards = replicate * shard, 1, 1
    return Grid(
        dense=(layout.pipeline, replicate, shard, layout.tensor),
        experts=(layout.pipeline, copies // shards, shards, layout.expert),
        sequences=(layout.pipeline, layout.data, layout.context, layout.tensor),
    )


def require_supported(layout: ParallelConfig, model: ModelConfig, world_size: int) -> None:
    """Raise ConfigError for a layout that does not fit the processes or the model, or that the trainer cannot do."""
    if layout.world != world_size:
        raise ConfigError(
            f"the layout ({layout}) is for {layout.world} processes, but {world_size} were started",
            hint=f"torchrun --nproc-per-node {layout.world}, or choose axes that multiply to {world_size}",
        )
    layout.check_model(model)
    _require_latents(layout, model)
    if layout.pipeline > 1:
        _require_supported_pipeline(layout, model)
    shards = grid(layout).experts[2]
    for name, size in _expert_widths(layout, model):
        if shards > 1 and model.n_routed_experts // layout.expert % shards and size % shards:
            raise ConfigError(
                f"{model.n_routed_experts // layout.expert} experts a rank cannot be split over the {shards} ranks "
                f"that hold them, and neither can {name} ({size})",
                hint="choose parallel.expert and parallel.shard so that shard / expert divides one of them",
            )


def _require_latents(layout: ParallelConfig, model: ModelConfig) -> None:
    """Heads and sequences are split over ranks where keys and values come from latents."""
    for axis in ("tensor", "context"):
        if getattr(layout, axis) > 1 and model.attention_kind != "mla":
            raise ConfigError(
                f"parallel.{axis} is {getattr(layout, axis)}; it needs a model with latent attention (kv_lora_rank), "
                f"and this one's is {model.attention_kind}",
                hint="use parallel.shard",
            )
    if layout.tensor > 1 and model.output_bias:
        raise ConfigError(
            f"parallel.tensor is {layout.tensor}; each of its ranks would add attention's output bias",
            hint="use parallel.shard",
        )


def _require_supported_pipeline(layout: ParallelConfig, model: ModelConfig) -> None:
    if layout.schedule == "dualpipe":
        raise ConfigError(
            "parallel.schedule is 'dualpipe', which holds the model twice; the trainer runs 'dualpipev', its form with "
            "one copy and the same bubble",
            hint=f"--parallel.schedule dualpipev, on {layout.pipeline // 2} or {layout.pipeline} pipeline ranks",
        )
    if model.tie_word_embeddings:
        raise ConfigError(
            f"parallel.pipeline is {layout.pipeline}, but the model's head is its embedding: one matrix cannot be on "
            "the first stage and on the last",
            hint="set model.tie_word_embeddings to false, or leave parallel.pipeline at 1",
        )
    for axis in ("tensor", "context"):
        if getattr(layout, axis) > 1:
            raise ConfigError(
                f"parallel.{axis} is {getattr(layout, axis)} and parallel.pipeline {layout.pipeline}; a stage's ranks "
                "have whole sequences and whole layers",
                hint=f"leave parallel.{axis} or parallel.pipeline at 1",
            )
    if layout.zero > 1 and layout.dense_shards > 1:
        raise ConfigError(
            f"parallel.zero is {layout.zero}; in a pipeline gradients of all micro-batches add up whole before they "
            "are summed over ranks, so optimiser states alone can be split",
            hint="--parallel.zero 1",
        )


def _expert_widths(layout: ParallelConfig, model: ModelConfig) -> list[tuple[str, int]]:
    if layout.expert == layout.tensor == 1 or not model.n_routed_experts:
        return []
    return [("2 x moe_intermediate_size", 2 * model.moe_intermediate_size), ("hidden_size", model.hidden_size)]


def description(layout: ParallelConfig, model: ModelConfig) -> str:
    """The layout in a sentence, with what each axis is for."""
    _, replicas, shards, _ = grid(layout).dense
    split = {1: "optimiser states", 2: "optimiser states and gradients", 3: "weights, gradients and optimiser states"}
    parts = [f"{layout.world} ranks"]
    if layout.pipeline > 1:
        parts.append(f"{layout.stages} stages over {layout.pipeline} ranks, schedule {layout.schedule}")
    if shards > 1:
        parts.append(f"{split[layout.zero]} split over {shards} (zero {layout.zero})")
    if replicas > 1:
        parts.append(f"{replicas} replicas, gradients summed over them")
    if layout.tensor > 1:
        parts.append(
            f"heads, dense and shared widths and words split over {layout.tensor}, positions too between sublayers"
        )
    if layout.context > 1:
        parts.append(f"every sequence over {layout.context}, an early and a late stretch each, latents gathered")
    if layout.expert > 1:
        held = model.n_routed_experts // layout.expert
        parts.append(
            f"{model.n_routed_experts} experts over {layout.expert}, {held} each, in {layout.expert_copies} copies"
        )
        reached = _ranks_reached(layout, model)
        if reached < min(layout.expert, model.num_experts_per_tok):
            parts.append(f"a token goes to at most {reached} of them")
    return "; ".join(parts)


def _ranks_reached(layout: ParallelConfig, model: ModelConfig) -> int:
    """Most ranks that hold experts of one token, which are of at most topk_group groups of consecutive experts."""
    held, group = model.n_routed_experts // layout.expert, model.n_routed_experts // model.n_group
    # A group that does not begin where a rank's experts do reaches into one rank more.
    ranks = max((last // held) - (first // held) + 1 for first, last in _ends(group, model.n_group))
    return min(layout.expert, model.num_experts_per_tok, model.topk_group * ranks)


def _ends(size: int, count: int) -> list[tuple[int, int]]:
    """First and last of each of `count` pieces of `size`."""
    return [(start * size, (start + 1) * size - 1) for start in range(count)]


def _digits(number: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    digits: list[int] = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        digits.append(digit)
    return tuple(reversed(digits))

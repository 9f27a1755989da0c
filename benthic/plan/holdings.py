"""Which parameters a rank holds: its pipeline stages' layers, cut by tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from benthic.config.manifest import Parameter, parameters
from benthic.config.model import ModelConfig
from benthic.config.parallel import MIRRORED, ParallelConfig


@dataclass(frozen=True, slots=True)
class Holding:
    """Elements of one block of the model on one rank: dense ones and routed experts (ZeRO shards them over different
    ranks), how many of both are FP8 in the published layout, float32 buffers, and the largest tensor."""

    dense: float = 0.0
    routed: float = 0.0
    fp8: float = 0.0
    buffers: float = 0.0
    largest: float = 0.0

    @property
    def elements(self) -> float:
        """Elements that are trained."""
        return self.dense + self.routed

    def __add__(self, other: Holding) -> Holding:
        return Holding(
            self.dense + other.dense,
            self.routed + other.routed,
            self.fp8 + other.fp8,
            self.buffers + other.buffers,
            max(self.largest, other.largest),
        )

    def sharded(self, layout: ParallelConfig) -> float:
        """Trained elements left on a rank once they are split over the ranks that hold copies."""
        return self.dense / layout.dense_shards + self.routed / layout.expert_shards


def hold(rows: Iterable[Parameter], expert: int, tensor: int) -> Holding:
    """What one rank holds of `rows` when experts and matrices are split over so many."""
    total = Holding()
    for row in rows:
        routed = row.part == "routed"
        split = expert if routed else tensor if row.shard_axis is not None else 1
        size = row.size / split
        if row.group == "routing_bias":
            total += Holding(buffers=size)
        else:
            total += Holding(size * (not routed), size * routed, size * row.fp8, 0.0, size)
    return total


def stages_of_rank(layout: ParallelConfig, rank: int) -> list[int]:
    """Indices of the stages a pipeline rank holds: mirrored or strided, as the schedule is."""
    if layout.schedule in MIRRORED and layout.pipeline > 1:
        return [rank, layout.stages - 1 - rank]
    return [rank + chunk * layout.pipeline for chunk in range(layout.stages_per_rank)]


@dataclass(frozen=True, slots=True)
class Rank:
    """One pipeline rank: its `layers` in order, and its blocks by name: "embedding", "head" (with the final norm), and
    for each layer i "attention i", "experts i" and "feed_forward i" (all that is neither)."""

    layers: tuple[int, ...]
    blocks: dict[str, Holding]
    first: bool
    last: bool

    @property
    def total(self) -> Holding:
        """All blocks together."""
        return sum(self.blocks.values(), Holding())

    @property
    def largest_layer(self) -> float:
        """Elements of the largest layer, which FSDP gathers as one."""
        return max(sum(self.blocks[name].elements for name in block_names(i)) for i in self.layers)


def block_names(layer: int) -> tuple[str, str, str]:
    """Names of a layer's blocks, in forward order."""
    return f"attention {layer}", f"experts {layer}", f"feed_forward {layer}"


def pipeline_rank(config: ModelConfig, layout: ParallelConfig, stages: Sequence[range], rank: int) -> Rank:
    """What pipeline rank `rank` holds when `stages` are the layers of each stage, prediction layers last.

    Prediction layers, on the last stage, are passed rows of the first stage's embedding; a tied head is that matrix.
    """
    layers = tuple(layer for stage in stages_of_rank(layout, rank) for layer in stages[stage])
    end = config.num_hidden_layers + config.num_nextn_predict_layers - 1
    first, last = 0 in layers, end in layers
    embeds = first or (last and config.tie_word_embeddings)
    held = _blocks(config, layout.expert, layout.tensor)
    names = [name for layer in layers for name in block_names(layer)]
    outside = {"embedding": held["embedding"] if embeds else Holding(), "head": held["head"] if last else Holding()}
    return Rank(layers, outside | {name: held[name] for name in names}, first, last)


def layer_holding(config: ModelConfig, layout: ParallelConfig, layer: int) -> Holding:
    """What one rank holds of a layer."""
    held = _blocks(config, layout.expert, layout.tensor)
    return sum((held[name] for name in block_names(layer)), Holding())


def whole_model(config: ModelConfig, layout: ParallelConfig) -> Holding:
    """What one rank would hold of all layers, embedding and head."""
    return sum(_blocks(config, layout.expert, layout.tensor).values(), Holding())


@lru_cache(maxsize=256)
def _blocks(config: ModelConfig, expert: int, tensor: int) -> dict[str, Holding]:
    return {name: hold(rows, expert, tensor) for name, rows in _rows_of_blocks(config).items()}


@lru_cache(maxsize=8)
def _rows_of_blocks(config: ModelConfig) -> dict[str, list[Parameter]]:
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    rows: dict[str, list[Parameter]] = {name: [] for layer in range(layers) for name in block_names(layer)}
    rows |= {"embedding": [], "head": []}
    for row in parameters(config):
        rows[_block(row)].append(row)
    return rows


def _block(row: Parameter) -> str:
    if row.layer is None:
        return "embedding" if row.part == "embedding" else "head"
    attention, experts, feed_forward = block_names(row.layer)
    if row.part == "routed":
        return experts
    return attention if ".self_attn." in row.name else feed_forward

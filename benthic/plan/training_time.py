"""Time of a training step: its slowest rank's layers, the pipeline's bubble, synchronisation and the update.

A rank's time is the sum over its layers (layer_time.py); the slowest rank sets the pace of its pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.breakdown import Breakdown, Term
from benthic.plan.communication import synchronisation_seconds
from benthic.plan.devices import MEMORY_WORKS, Device, Precision, Work
from benthic.plan.flops import training_flops_per_token
from benthic.plan.holdings import pipeline_rank, stages_of_rank
from benthic.plan.kernels import Kernels, moving_seconds
from benthic.plan.layer_time import GROUPED_TILE, Overheads, Piece, embedding_pieces, head_pieces, layer_pieces
from benthic.plan.pipeline import StageTime, bubble, cut_layers
from benthic.plan.traffic import update_traffic
from benthic.plan.training import Training

OVERLAPPING = ("dualpipe", "dualpipev")
"""Schedules that pair the forward of one micro-batch with the backward of another, one's exchange under the other's
computation."""


@dataclass(frozen=True, slots=True)
class StepTime(Breakdown):
    """Seconds of one step on the slowest rank. `tokens` and `flops` (model FLOPs) are the whole step's."""

    gpus: int = 1
    tokens: int = 0
    flops: float = 0.0
    micro_batches: int = 1
    stage: StageTime | None = None
    stages: tuple[range, ...] = ()

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.tokens / self.total / self.gpus

    @property
    def flops_per_second_per_gpu(self) -> float:
        """Model FLOP/s of one GPU: causal attention, prediction layers included, recomputation not."""
        return self.flops / self.total / self.gpus

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """GPU-hours for 1e12 tokens at this pace."""
        return 1e12 / self.tokens_per_second_per_gpu / 3600

    def share(self, part: str) -> float:
        """Share of the step that a part takes."""
        return self.by_part.get(part, 0.0) / self.total


def step_time(
    config: ModelConfig,
    training: Training,
    device: Device,
    layout: ParallelConfig | None = None,
    sequences: int | None = None,
    overheads: Overheads | None = None,
) -> StepTime:
    """Time of a step over `sequences` (by default one micro-batch a rank times `training.micro_batches`).

    Raises ConfigError where layout and batch do not divide.
    """
    layout, overheads = layout or ParallelConfig(), overheads or Overheads()
    layout.check_model(config)
    sequences = sequences or layout.data * training.micro_batch * training.micro_batches
    count = layout.check_batch(sequences, training.micro_batch, training.sequence_length)
    pieces = all_pieces(config, training, device, layout, overheads)
    return assemble(config, training, device, layout, sequences, count, pieces, overheads)


def all_pieces(
    config: ModelConfig, training: Training, device: Device, layout: ParallelConfig, overheads: Overheads
) -> list[list[Piece]]:
    """Pieces of every layer, the heads with the last one. Layers of a kind are alike. Of the layout, only the tensor,
    expert and context axes matter."""
    kinds: dict[tuple[bool, bool], list[Piece]] = {}
    pieces = []
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        kind = (config.is_expert_layer(layer), layer >= config.num_hidden_layers)
        if kind not in kinds:
            kinds[kind] = layer_pieces(config, training, device, layout, layer, overheads)
        pieces.append(kinds[kind])
    pieces[0] = [*pieces[0], *embedding_pieces(config, training, device, layout, overheads)]
    pieces[-1] = [*pieces[-1], *head_pieces(config, training, device, layout, overheads)]
    return pieces


def assemble(
    config: ModelConfig,
    training: Training,
    device: Device,
    layout: ParallelConfig,
    sequences: int,
    count: int,
    pieces: Sequence[Sequence[Piece]],
    overheads: Overheads,
) -> StepTime:
    """A step of `count` micro-batches a rank from the pieces of its layers."""
    stages = cut_layers(config, [sum(piece.seconds for piece in layer) for layer in pieces], layout.stages)
    # A rank's micro-batch passes through each stage it holds; DualPipe sends half of them through each.
    halves = 2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1
    of_rank = [
        [piece for stage in stages_of_rank(layout, rank) for layer in stages[stage] for piece in pieces[layer]]
        for rank in range(layout.pipeline)
    ]
    stage_times = [_stage_time(found, layout, overheads, halves) for found in of_rank]
    slowest = max(range(layout.pipeline), key=lambda rank: stage_times[rank].both)
    stage = stage_times[slowest]
    one_stage = _stage_time(of_rank[slowest], layout, overheads, layout.stages_per_rank)
    terms: list[Term] = []
    computing = 0.0
    for part in dict.fromkeys(piece.part for piece in of_rank[slowest] if piece.part != "exchange"):
        seconds = sum(piece.seconds for piece in of_rank[slowest] if piece.part == part) / halves
        computing += seconds
        terms.append(Term("compute", part, f"{count} micro-batches x {seconds:.4g} s", count * seconds))
    exposed = stage.both - computing
    whole = sum(piece.seconds for piece in of_rank[slowest] if piece.part == "exchange") / halves
    formula = f"{count} x {exposed:.4g} s of {whole:.4g} s not hidden" if whole else "nothing to exchange"
    terms.append(Term("exposed communication", "exchange and overlap", formula, count * exposed))
    waiting, formula = bubble(layout, one_stage)
    terms.append(Term("bubble", f"pipeline, {layout.schedule}", formula, waiting))
    terms += _synchronisation(config, training, device, layout, count, stages, slowest)
    tokens = sequences * training.sequence_length
    predicts = config.num_nextn_predict_layers > 0
    flops = tokens * training_flops_per_token(config, training.sequence_length, include_mtp=predicts)
    shown = tuple(term for term in terms if term.value)
    notes = _assumptions(device, training, overheads)
    return StepTime("seconds", shown, notes, layout.world, tokens, flops, count, one_stage, tuple(stages))


def _stage_time(pieces: Iterable[Piece], layout: ParallelConfig, overheads: Overheads, share: int) -> StageTime:
    phases: dict[str, float] = {}
    for piece in pieces:
        phases[piece.phase] = phases.get(piece.phase, 0.0) + piece.seconds / share
    forward, backward, weight = (phases.get(name, 0.0) for name in ("forward", "backward", "weight"))
    there, back = phases.get("forward exchange", 0.0), phases.get("backward exchange", 0.0)
    backward += weight
    overlapped = None
    if layout.schedule in OVERLAPPING and layout.pipeline > 1:
        overlapped = max((forward + backward) * (1 + overheads.overlap_stall), there + back)
    return StageTime(forward + there, backward + back, weight, overlapped)


def _synchronisation(
    config: ModelConfig,
    training: Training,
    device: Device,
    layout: ParallelConfig,
    count: int,
    stages: Sequence[range],
    rank: int,
) -> list[Term]:
    held = pipeline_rank(config, layout, stages, rank).total
    # DualPipe holds every stage twice, on mirrored ranks: both copies of a gradient are added up too.
    copies = 2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1
    weight = 4 if training.precision == "fp32" else 2
    terms = []
    for name, elements, ranks in (
        ("dense", held.dense, layout.replicate * layout.dense_shards * copies),
        ("routed", held.routed, layout.expert_copies * copies),
    ):
        if elements:
            seconds, formula = synchronisation_seconds(layout, device, ranks, weight * elements, 4 * elements, count)
            terms.append(Term("synchronisation", f"gradients and weights, {name}", formula, seconds))
    state = held.sharded(layout) if layout.zero >= 1 else held.elements
    kernels = [(one, state) for one in update_traffic(training)]
    if training.precision == "fp8":
        copies = Kernels("update", "weights in FP8", "forward", "quantise_weights", 2 + 2)
        kernels.append((copies, held.fp8))
    for one, elements in kernels:
        seconds = sum(moving_seconds([one], elements, device).values())
        rate = elements * one.bytes / seconds
        formula = f"{elements:,.0f} elements x {one.bytes:.0f} B / {rate / 1e12:.3g} TB/s"
        terms.append(Term("update", one.name, formula, seconds))
    return terms


def _assumptions(device: Device, training: Training, overheads: Overheads) -> tuple[str, ...]:
    matrices: tuple[Work, ...] = ("matmul", "weight_gradient", "grouped", "grouped_weight_gradient")
    attention: tuple[Work, ...] = ("attention", "attention_backward")
    core: Precision = "fp32" if training.precision == "fp32" else "bf16"
    used: list[tuple[Work, Precision]] = [(work, training.precision) for work in matrices]
    used += [(work, core) for work in attention]
    rates = [(work, precision, device.rate(work, precision)) for work, precision in used]
    found = [f"{work}, {precision}: {_speed(rate.value, 'FLOP')} ({rate.source})" for work, precision, rate in rates]
    found.append(f"memory-bound work: {overheads.source}")
    if overheads.memory_share is None:
        for kind in MEMORY_WORKS:
            bandwidth = device.bandwidth(kind)
            found.append(f"{kind} kernels: {_speed(bandwidth.value, 'B')} ({bandwidth.source})")
        launch = device.launch_seconds
        found.append(f"a kernel takes {launch.value * 1e6:.1f} us or longer ({launch.source})")
        if training.precision != "fp8":
            found.append(f"grouped products work in tiles of {GROUPED_TILE} rows")
    return tuple(found)


def _speed(value: float, unit: str) -> str:
    """Three significant digits of `value` units a second, in thousands of millions below a million millions."""
    prefix, scaled = ("T", value / 1e12) if value >= 1e12 else ("G", value / 1e9)
    return f"{scaled:.0f} {prefix}{unit}/s" if scaled >= 100 else f"{scaled:.3g} {prefix}{unit}/s"

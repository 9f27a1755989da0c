"""Memory of training on the fullest GPU: a step played through a ledger that remembers its highest moment.

What stays: weights (in FP8 training with their FP8 copies), float32 master weights, moments, and from the first
backward on gradients. What comes and goes: activations (activations.py), and the workspace of single operations
(playback.py). Which moment is the highest depends on sizes: the loss at the end of the forward, an expert layer's
backward, the embedding's gradient at the very end, or the optimiser's step. So the moments are played in order instead
of adding up worst cases.

Checked against torch.cuda.max_memory_allocated by benchmarks/plan_vs_measured.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.breakdown import Breakdown, Term
from benthic.plan.devices import DEVICES, Device
from benthic.plan.holdings import Rank, pipeline_rank, stages_of_rank
from benthic.plan.ledger import Ledger
from benthic.plan.pipeline import cut_layers
from benthic.plan.playback import Playback
from benthic.plan.training import Training

FP8_COPIES = 2 * (1 + 4 / 128**2)
"""Bytes of a quantised weight's copies in e4m3, as it lies and transposed, with a float32 scale a block."""


STANDING = ("weights", "master weights", "moments", "gradients")
"""Parts of a rank's memory that stay."""
GATHERED, BEING_REDUCED = "gathered layers", "layer being reduced"


@dataclass(frozen=True, slots=True)
class TrainingMemory(Breakdown):
    """Bytes on the fullest GPU at its highest `moment`; `rank` is its place in the pipeline."""

    moment: str = ""
    rank: int = 0

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated would say: all but the allowances."""
        return sum(line.value for line in self.lines if line.part != "allowance")


def training_memory(
    config: ModelConfig,
    training: Training,
    layout: ParallelConfig | None = None,
    stages: Sequence[range] | None = None,
    device: Device = DEVICES["h200"],
) -> TrainingMemory:
    """Memory of the fullest rank. `stages` are the layers of each stage (prediction layers last); by default layers
    are dealt out evenly. Of `device` only what all GPUs share counts: the allowances, which a CPU does not have, and
    how many logits the loss holds.

    Raises ConfigError where the layout does not divide the model.
    """
    layout = layout or ParallelConfig()
    layout.check_model(config)
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    stages = stages or cut_layers(config, [1.0] * blocks, layout.stages)
    found = [
        memory_of_rank(config, training, layout, stages, rank, device)
        for rank in kinds_of_ranks(config, layout, stages)
    ]
    return max(found, key=lambda memory: memory.total)


def kinds_of_ranks(config: ModelConfig, layout: ParallelConfig, stages: Sequence[range]) -> dict[int, list[int]]:
    """Places of the pipeline that hold alike layers, by the first of them: none keeps more micro-batches than it."""
    kinds: dict[tuple, list[int]] = {}
    end = config.num_hidden_layers + config.num_nextn_predict_layers - 1
    for rank in range(layout.pipeline):
        layers = [layer for stage in stages_of_rank(layout, rank) for layer in stages[stage]]
        special = {0, end} & set(layers) | {layer for layer in layers if layer >= config.num_hidden_layers}
        kinds.setdefault((*map(config.is_expert_layer, layers), *sorted(special)), []).append(rank)
    return {places[0]: places for places in kinds.values()}


def memory_of_rank(
    config: ModelConfig, training: Training, layout: ParallelConfig, stages: Sequence[range], rank: int, device: Device
) -> TrainingMemory:
    """Memory of pipeline rank `rank`; as `training_memory`'s."""
    playback = _played(config, training, layout, stages, rank, device)
    ledger = playback.ledger
    terms = ledger.terms(playback.tokens)
    lines = (*terms, *_allowances(sum(term.value for term in terms), device))
    return TrainingMemory("bytes", lines, _assumptions(training, layout, device), ledger.highest, rank)


def _played(
    config: ModelConfig, training: Training, layout: ParallelConfig, stages: Sequence[range], rank: int, device: Device
) -> Playback:
    held = pipeline_rank(config, layout, stages, rank)
    ledger = Ledger()
    _hold_states(ledger, held, training, layout)
    playback = Playback(config, training, layout, held, rank, ledger, device.logits_at_a_time)
    playback.play()
    return playback


def standing_memory(
    config: ModelConfig, training: Training, layout: ParallelConfig, stages: Sequence[range], rank: int
) -> dict[str, float]:
    """Bytes that do not come and go with micro-batches, by name, as they lie at the end of an update's last backward:
    weights in what they are used in, gradients, masters, moments, average. Not what FSDP gathers for a layer."""
    alive = _played(config, training, layout, stages, rank, DEVICES["h200"]).ledger.alive
    return {
        name: size
        for (part, name), size in alive.items()
        if isinstance(name, str) and part in STANDING and name not in (GATHERED, BEING_REDUCED) and size
    }


def _allowances(allocated: float, device: Device) -> list[Term]:
    loss = device.allocator_loss
    terms = [
        Term("allowance", "fragmentation", f"{loss:.0%} of {allocated:.4g} B", loss * allocated),
        Term("allowance", "CUDA context", "assumed", device.context_bytes),
    ]
    return [term for term in terms if term.value]


def _hold_states(ledger: Ledger, held: Rank, training: Training, layout: ParallelConfig) -> None:
    """Weights, master weights, moments; and the layers FSDP has gathered or is about to reduce.

    What several ranks hold are FSDP's float32 blocks, the masters, beside which whole weights stay gathered up to ZeRO
    2. Of a lone process, and of experts that no other rank holds, float32 weights are their own masters.
    """
    total = held.total
    own = total.elements if layout.world == 1 else total.routed if layout.lone_experts else 0.0
    gathered = 0.0 if layout.zero >= 3 and layout.pipeline == 1 else total.elements - own
    each = 4.0 if training.precision == "fp32" else 2.0
    resident = own + gathered
    ledger.hold("weights", "weights", resident * each, f"{resident:,.0f} elements x {each:.3g} B")
    if training.precision == "fp8":
        # Made once an update of what stays; of what FSDP gathers, with each use, and backward reads what forward made.
        staying = resident if layout.world == 1 or layout.pipeline > 1 else own
        remade = 0.0 if training.recomputation == "layer" else total.elements - staying
        for part, name, elements in (
            ("weights", "weights in FP8, both ways round", staying),
            ("activations", "weights in FP8, from forward to backward", remade),
        ):
            quantised = elements * total.fp8 / total.elements
            formula = f"{quantised:,.0f} elements x {FP8_COPIES:.3g} B"
            ledger.hold(part, name, quantised * FP8_COPIES, formula)
    ledger.hold("weights", "routing biases", total.buffers * 4, f"{total.buffers:,.0f} x 4 B")
    state = total.sharded(layout) if layout.zero >= 1 else total.elements
    masters = state - own if training.precision == "fp32" else state
    ledger.hold("master weights", "master weights", masters * 4, f"{masters:,.0f} elements x 4 B")
    moment = 2 if training.bf16_moments else 4
    ledger.hold("moments", "moments", state * 2 * moment, f"{state:,.0f} elements x 2 x {moment} B")
    if training.averaged_weights:
        ledger.hold("moments", "averaged weights", state * 4, f"{state:,.0f} elements x 4 B")
    layer = held.largest_layer
    if layout.zero >= 3 and layout.dense_shards > 1:
        ledger.hold("weights", GATHERED, 2 * layer * each, f"2 layers of {layer:,.0f} elements x {each:.3g} B")
    if layout.zero >= 2 and layout.dense_shards > 1:
        ledger.hold("gradients", BEING_REDUCED, layer * 4, f"{layer:,.0f} elements x 4 B")


def _assumptions(training: Training, layout: ParallelConfig, device: Device) -> tuple[str, ...]:
    found = []
    if device.context_bytes:
        context = device.context_bytes / 2**30
        found.append(f"the allocator loses {device.allocator_loss:.0%}; CUDA itself takes {context:.1f} GiB")
    found.append("activations as the trainer's path on a GPU keeps them, attention crossing documents")
    if training.precision == "fp8":
        found.append(
            "bfloat16 weights beside their FP8 copies, as benthic trains; DeepSeek's framework keeps FP8 alone"
        )
    if layout.tensor > 1:
        found.append("tensor parallelism divides every activation (sequence parallel norms)")
    if layout.pipeline > 1:
        found.append(f"{layout.schedule} keeps the published number of micro-batches in flight")
    return tuple(found)

"""DeepSeek-V3's own training run, predicted from its report's settings and set beside its published cost.

Settings (arXiv:2412.19437): 2,048 H800; 16-way pipeline with DualPipe, 64-way experts over 8 nodes, ZeRO-1; 14.8T
tokens at 4K, the batch growing from 3,072 to 15,360 sequences over the first 469B; then 1,000 steps of 1,920 sequences
at 32K and 1,000 of 480 at 128K; multi-token prediction; FP8 with bf16 moments; norms and up-projections recomputed.

Rates are those of single kernels in DeepSeek's published trace of one forward and backward pair (profile-data), not
fitted to the run's total. What the report does not say is assumed in `ASSUMPTIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import CapacityError
from benthic.plan.devices import DEVICES, Device
from benthic.plan.layer_time import Overheads
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.training import Training
from benthic.plan.training_time import StepTime, step_time

LAYOUT = ParallelConfig(pipeline=16, schedule="dualpipe", shard=128, zero=1, expert=64)
MEMORY_SHARE = 1 - (0.251 + 0.176 + 0.168 + 0.144)
"""Share of the trace's compute time outside weight gradients, grouped and dense products, and attention."""
IMBALANCE = 0.04
"""MaxVio of loss-free balancing on a whole validation set (arXiv:2408.15664, table 2)."""
TRAINING = Training(
    sequence_length=4096,
    precision="fp8",
    bf16_moments=True,
    recomputation="up_projections",
    expert_imbalance=IMBALANCE,
)
PRETRAINING_TOKENS, RAMP_TOKENS = 14.8e12, 469e9
FIRST_BATCH, LAST_BATCH = 3072, 15360
LARGEST_BATCH = {4096: LAST_BATCH, 32768: 1920, 131072: 480}
"""Sequences a step by sequence length."""
RAMP_PHASES = 8

PUBLISHED_HOURS = {"pretraining": 2.664e6, "context extension": 0.119e6, "post-training": 0.005e6}
PUBLISHED_HOURS_PER_TRILLION = 180e3
PUBLISHED_DOLLARS = 5.576e6

ASSUMPTIONS = (
    "one sequence a micro-batch; at 32K and 128K the smallest context parallelism that fits the memory",
    "layers dealt to stages so that the slowest is as fast as it can be, the heads with the last layer",
    f"the fullest expert rank gets {IMBALANCE:.0%} more than the mean (the trace itself is perfectly balanced)",
    f"memory-bound work takes {MEMORY_SHARE:.1%} of compute time, as in the trace",
    "both heads' losses are fused kernels that pass over the logits four times in bf16",
    "gradients and weights are exchanged once a step without overlap, at 50 GB/s",
    f"the batch grows in {RAMP_PHASES} equal steps of tokens",
    "every step runs at the trace's clock; no failures, restarts, evaluation or checkpoints",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run at one batch and sequence length."""

    name: str
    tokens: float
    sequences: int
    layout: ParallelConfig
    training: Training
    memory: TrainingMemory
    step: StepTime

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the stretch."""
        return self.tokens / 1e12 * self.step.gpu_hours_per_trillion_tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """One predicted figure beside the published one."""

    name: str
    predicted: float
    published: float
    unit: str

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published


@dataclass(frozen=True, slots=True)
class Replay:
    """The predicted run. `phases` end with the two of context extension; `effects` say by how much each assumption
    would move the hours of pretraining."""

    phases: tuple[Phase, ...]
    effects: dict[str, float]
    dollars_per_hour: float

    @property
    def main(self) -> Phase:
        """Pretraining at the full batch."""
        return next(phase for phase in self.phases if phase.sequences == LAST_BATCH)

    def hours(self, name: str) -> float:
        """Predicted GPU-hours of "pretraining" or "context extension"."""
        return sum(phase.gpu_hours for phase in self.phases if phase.name == name)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Predicted beside published. Post-training is not modelled, so its published hours are in both totals."""
        pretraining, extension = self.hours("pretraining"), self.hours("context extension")
        total = pretraining + extension + PUBLISHED_HOURS["post-training"]
        per_trillion = pretraining / PRETRAINING_TOKENS * 1e12
        return (
            Comparison("GPU-hours per trillion tokens", per_trillion, PUBLISHED_HOURS_PER_TRILLION, "GPU-hours"),
            Comparison("pretraining", pretraining, PUBLISHED_HOURS["pretraining"], "GPU-hours"),
            Comparison("context extension", extension, PUBLISHED_HOURS["context extension"], "GPU-hours"),
            Comparison("total", total, sum(PUBLISHED_HOURS.values()), "GPU-hours"),
            Comparison("cost", total * self.dollars_per_hour, PUBLISHED_DOLLARS, "dollars"),
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the prediction rests on, rates included."""
        return (*ASSUMPTIONS, *self.main.step.assumptions)


def replay(config: ModelConfig | None = None) -> Replay:
    """Predict DeepSeek-V3's run."""
    config, device = config or ModelConfig.from_pretrained("deepseek-v3"), DEVICES["h800"]
    overheads = Overheads(
        memory_share=MEMORY_SHARE, forwarding=True, source=f"{MEMORY_SHARE:.1%} of compute time, DeepSeek's trace"
    )
    fitting = {length: _fitting(config, device, length, batch) for length, batch in LARGEST_BATCH.items()}
    phases = []
    for name, tokens, sequences, length in _stretches():
        layout, memory = fitting[length]
        training = replace(TRAINING, sequence_length=length, micro_batches=sequences // layout.data)
        step = step_time(config, training, device, layout, sequences, overheads)
        phases.append(Phase(name, tokens, sequences, layout, training, memory, step))
    main = next(phase for phase in phases if phase.sequences == LAST_BATCH)
    return Replay(tuple(phases), _effects(config, device, overheads, main), device.dollars_per_hour.value)


def _stretches() -> Iterator[tuple[str, float, int, int]]:
    """Name, tokens, sequences a step, sequence length."""
    data = 2 * LAYOUT.data
    for step in range(RAMP_PHASES):
        batch = FIRST_BATCH + (LAST_BATCH - FIRST_BATCH) * (step + 0.5) / RAMP_PHASES
        yield "pretraining", RAMP_TOKENS / RAMP_PHASES, data * round(batch / data), 4096
    yield "pretraining", PRETRAINING_TOKENS - RAMP_TOKENS, LAST_BATCH, 4096
    for length in (32768, 131072):
        yield "context extension", 1000.0 * LARGEST_BATCH[length] * length, LARGEST_BATCH[length], length


def _fitting(config: ModelConfig, device: Device, length: int, sequences: int) -> tuple[ParallelConfig, TrainingMemory]:
    """The published layout with the smallest context parallelism that fits sequences of `length`, and its memory."""
    for context in (2**power for power in range(8)):
        layout = LAYOUT.replace(context=context, shard=LAYOUT.shard // context)
        if sequences % (2 * layout.data):
            continue
        training = replace(TRAINING, sequence_length=length, micro_batches=sequences // layout.data)
        memory = training_memory(config, training, layout, device=device)
        if memory.total <= device.memory_bytes:
            return layout, memory
    raise CapacityError(f"sequences of {length} positions fit {device.title} at no context parallelism up to 128")


def _effects(config: ModelConfig, device: Device, overheads: Overheads, main: Phase) -> dict[str, float]:
    """Pretraining hours under another assumption, over those predicted, minus 1."""

    def other(
        training: Training = main.training,
        overheads: Overheads = overheads,
        device: Device = device,
        schedule: str = "dualpipe",
    ) -> float:
        layout = main.layout.replace(schedule=schedule)
        step = step_time(config, training, device, layout, main.sequences, overheads)
        return step.total / main.step.total - 1

    slower = {key: replace(rate, value=0.9 * rate.value) for key, rate in device.measured.items()}
    synchronisation = main.step.share("synchronisation")
    return {
        "kernels 10% slower than in the trace": other(device=replace(device, measured=slower)),
        "the fullest expert rank 20% above the mean": other(replace(main.training, expert_imbalance=0.2)),
        "perfectly balanced experts": other(replace(main.training, expert_imbalance=0.0)),
        "no stall in overlapped pairs": other(overheads=replace(overheads, overlap_stall=0.0)),
        "1F1B, nothing hidden": other(schedule="1f1b"),
        "1F1B and no limit on nodes": other(overheads=replace(overheads, group_limit=False), schedule="1f1b"),
        "synchronisation hidden": -synchronisation,
        "one step in ten lost to failures": 1 / 0.9 - 1,
    }

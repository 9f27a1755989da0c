"""Pipeline schedules: what a rank waits, and how many activations it keeps.

Times of one stage for one micro-batch: F forward, B backward (input and weight gradients), W its weight-gradient part,
FB an overlapped forward and backward. Published bubbles (DualPipe README; zero bubble: arXiv:2401.10241):

    1f1b         (P - 1) (F + B)
    interleaved  (P - 1) (F + B) / chunks                     Narayanan et al., arXiv:2104.04473
    gpipe        (P - 1) (F + B)                              Huang et al., arXiv:1811.06965
    zb1p         (P - 1) (F + B - 2 W) / chunks
    zbv          (P - 1) (F + B - 3 W)                        two half stages a rank; 0 where F = W = B - W
    dualpipe     (P / 2 - 1) (FB + B - 3 W)                   two stages a rank, every parameter twice
    dualpipev    (P - 1) (FB + B - 3 W)                       two half stages a rank, on P = half as many ranks

DualPipeV on P ranks cuts the model into 2 P stages, like DualPipe on 2 P ranks; with F, B, W of one of those 2 P stages
its bubble is DualPipe's, (2 P / 2 - 1) (FB + B - 3 W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage for one micro-batch. `backward` holds `weight_gradient`."""

    forward: float
    backward: float
    weight_gradient: float
    overlapped: float | None = None

    @property
    def both(self) -> float:
        """An overlapped forward and backward pair; without overlap, one after the other."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped


def bubble(layout: ParallelConfig, stage: StageTime) -> tuple[float, str]:
    """Seconds a rank waits in one step, and the formula with its numbers."""
    ranks, forward, backward, weight = layout.pipeline, stage.forward, stage.backward, stage.weight_gradient
    if ranks == 1:
        return 0.0, "no pipeline"
    match layout.schedule:
        case "1f1b" | "gpipe":
            seconds, formula = (ranks - 1) * (forward + backward), f"({ranks} - 1) (F + B)"
        case "interleaved":
            seconds, formula = (ranks - 1) * (forward + backward), f"({ranks} - 1) (F + B) of 1/{layout.chunks} stage"
        case "zb1p":
            seconds, formula = (ranks - 1) * (forward + backward - 2 * weight), f"({ranks} - 1) (F + B - 2 W)"
        case "zbv":
            seconds, formula = (ranks - 1) * (forward + backward - 3 * weight), f"({ranks} - 1) (F + B - 3 W)"
        case "dualpipe":
            seconds, formula = (
                (ranks / 2 - 1) * (stage.both + backward - 3 * weight),
                f"({ranks} / 2 - 1) (FB + B - 3 W)",
            )
        case "dualpipev":
            seconds, formula = (ranks - 1) * (stage.both + backward - 3 * weight), f"({ranks} - 1) (FB + B - 3 W)"
    return max(
        0.0, seconds
    ), f"{formula}, F {forward:.4g} s, B {backward:.4g} s, W {weight:.4g} s, FB {stage.both:.4g} s"


def steady(layout: ParallelConfig, stage: StageTime, micro_batches: int) -> float:
    """Seconds a rank works in one step on stages of this time.

    DualPipe sends half the micro-batches through each of a rank's two stages; the schedules with several stages on a
    rank send every micro-batch through each of them.
    """
    passes = 1 if layout.schedule == "dualpipe" else layout.stages_per_rank
    return micro_batches * passes * stage.both


def chunks_in_flight(layout: ParallelConfig, rank: int, micro_batches: int) -> float:
    """Forward passes of one stage whose activations pipeline rank `rank` keeps at once.

    GPipe: all. 1F1B: P - rank. Interleaved: (chunks - 1) P + 1 + 2 (P - 1 - rank), the forwards before the first
    backward (arXiv:2104.04473, section 2.2); ZB1P: (chunks - 1) P + P - rank. ZBV: 2 P of its half-size stages
    (arXiv:2401.10241, section 6). DualPipe: P + 1, DualPipeV: 2 P + 1 of its half-size stages (DualPipe README).
    """
    ranks = layout.pipeline
    if ranks == 1:
        return 1
    match layout.schedule:
        case "gpipe":
            return micro_batches
        case "1f1b":
            return min(ranks - rank, micro_batches)
        case "zb1p":
            return min((layout.chunks - 1) * ranks + ranks - rank, micro_batches * layout.chunks)
        case "zbv":
            return min(2 * ranks, 2 * micro_batches)
        case "interleaved":
            return min((layout.chunks - 1) * ranks + 1 + 2 * (ranks - 1 - rank), micro_batches * layout.chunks)
        case "dualpipe":
            return min(ranks + 1, micro_batches)
        case "dualpipev":
            return min(2 * ranks + 1, 2 * micro_batches)


def cut_layers(config: ModelConfig, costs: Sequence[float], stages: int) -> list[range]:
    """`cut` of layers of these costs, prediction layers last: they are not parted."""
    tail = max(0, config.num_nextn_predict_layers - 1)
    joined = len(costs) - tail
    found = cut([*costs[: joined - 1], sum(costs[joined - 1 :])], stages)
    return [*found[:-1], range(found[-1].start, len(costs))]


def cut(costs: Sequence[float], stages: int) -> list[range]:
    """Contiguous ranges of items, one a stage, whose largest sum of costs is as small as it can be."""
    if not 1 <= stages <= len(costs):
        raise ConfigError(f"cannot cut {len(costs)} layers into {stages} stages; use 1 to {len(costs)} stages")
    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        if _stages_needed(costs, middle) <= stages:
            high = middle
        else:
            low = middle
    return _fill(costs, stages, high)


def _stages_needed(costs: Sequence[float], limit: float) -> int:
    needed, load = 1, 0.0
    for cost in costs:
        if load + cost > limit:
            needed, load = needed + 1, 0.0
        load += cost
    return needed


def _fill(costs: Sequence[float], stages: int, limit: float) -> list[range]:
    ranges, start, load = [], 0, 0.0
    for index, cost in enumerate(costs):
        stages_left = stages - len(ranges) - 1
        must_close = index > start and len(costs) - index <= stages_left
        if stages_left and (must_close or (index > start and load + cost > limit * (1 + 1e-12))):
            ranges.append(range(start, index))
            start, load = index, 0.0
        load += cost
    ranges.append(range(start, len(costs)))
    return ranges

"""What makes an update of a pretraining run: its batch, the losses beside the main one, the optimiser, number formats,
and what is given for memory."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from benthic.config.manifest import Group
from benthic.config.model import Positive
from benthic.config.schedule import Schedule, Scheduled
from benthic.config.settings import Settings


class OptimizerConfig(Settings):
    """AdamW (arXiv:1711.05101) with DeepSeek-V3's settings (arXiv:2412.19437, section 4.2).

    `decayed_groups` are the manifest's groups that weight decay acts on: matrices and embeddings here; Moonlight
    (arXiv:2502.16982) adds "gain".
    """

    learning_rate: Scheduled = Schedule(peak=2.2e-4)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decayed_groups: tuple[Group, ...] = ("matrix", "embedding")
    clip_norm: float | None = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the averaged weights, which are validated beside the trained ones; None keeps no average."""

    @field_validator("decayed_groups")
    @classmethod
    def _no_gradient_no_decay(cls, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        if "routing_bias" in groups:
            raise ValueError("a routing_bias is moved by the balancing rule alone and has no weight decay")
        return groups


class BatchConfig(Settings):
    """How many sequences make an update, and how many go through the model at once."""

    sequences: Scheduled = Schedule(peak=1)
    """Sequences an update; a changing number is rounded down to whole micro-batches."""
    micro_sequences: Positive = 1

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        peak = self.sequences.peak
        if peak < self.micro_sequences or peak % self.micro_sequences:
            raise ValueError(
                f"sequences is {peak:g} at its peak; it must be a multiple of micro_sequences ({self.micro_sequences})"
            )
        return self


class BalanceConfig(Settings):
    """How experts are kept evenly loaded.

    `bias_rule` moves `e_score_correction_bias` after each update: "sign" as in arXiv:2408.15664, "centred_sign" with
    the mean of the signs taken off (Moonlight), so that biases do not drift together; selection is the same.
    `speed` is for updates of `reference_tokens` tokens or more, and shrinks with the square root of the tokens below
    that: see train/balance.py for why.
    `auxiliary_loss` is "sequence" (DeepSeek-V3, equations 17 to 20), "expert" (DeepSeek-V2's expert-level loss, on
    the experts actually selected), "batch" (the same over a micro-batch) or "none"; `alpha` weighs it, per layer.
    `device_alpha` and `communication_alpha` weigh DeepSeek-V2's losses over the model's n_group groups of experts,
    which stand for its devices (equations 26 to 31; alpha 2 and 3 there, 0.05 and 0.02): what each group computes, and
    what each is sent where tokens reach only topk_group of them.
    """

    bias_rule: Literal["sign", "centred_sign", "none"] = "centred_sign"
    speed: Scheduled = Schedule(peak=1e-3)
    reference_tokens: Positive = 51_200
    auxiliary_loss: Literal["sequence", "expert", "batch", "none"] = "sequence"
    alpha: float = Field(1e-4, ge=0)
    device_alpha: float = Field(0.0, ge=0)
    communication_alpha: float = Field(0.0, ge=0)


class PredictionConfig(Settings):
    """Multi-token prediction: the weight of its loss (lambda of DeepSeek-V3, section 2.2)."""

    weight: Scheduled = Schedule(peak=0.3)


class PrecisionConfig(Settings):
    """`compute`: what matrices are multiplied in; master weights are float32 always.

    "auto" is bfloat16 on a GPU and float32 on a CPU; `config.yaml` holds what it came to. "float8" is a bfloat16 model
    whose matrices are multiplied in FP8 as DeepSeek-V3's are (arXiv:2412.19437, section 3.3). `moments`: what AdamW
    keeps its averages in; it computes with them in float32 (DeepSeek-V3 keeps bfloat16).
    """

    compute: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    moments: Literal["float32", "bfloat16"] = "float32"


class MemoryConfig(Settings):
    """What a run gives for memory: work done twice, or transfers.

    `recomputation`: what backward makes again instead of keeping it. "up_projections" are norm outputs, what is
    expanded from latents and SwiGLU products (DeepSeek-V3, section 3.2.3), cheap all of them; "layer" is everything
    but each layer's input, a third more work. Neither changes a bit of the result.
    `offload_average` keeps the averaged weights in the processor's memory, `offload_optimizer` moments and master
    weights, and their average with them; both are for GPUs.
    """

    recomputation: Literal["none", "up_projections", "layer"] = "none"
    offload_average: bool = False
    offload_optimizer: bool = False

"""TrainConfig: everything a pretraining run depends on, frozen, written to `config.yaml` and read back unchanged.

A recipe is a function that returns one. Quantities that change during a run (learning rate, batch size, weight of the
prediction loss, speed of the routing bias) are all the same thing: a `Schedule`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from benthic.config.data import DataConfig
from benthic.config.manifest import Group
from benthic.config.model import ModelConfig, Positive
from benthic.config.parallel import ParallelConfig
from benthic.config.settings import Settings, read_text
from benthic.config.yaml_text import read_yaml
from benthic.errors import ConfigError

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]

BFLOAT16_STEP = 2**-8
"""Least share by which a bfloat16 number moves whatever its mantissa: half the widest spacing."""


class Phase(Settings):
    """One stretch of a schedule: how the factor on the peak moves, and where the stretch ends.

    `until` counts from the start of the run: updates, tokens, or the share of all updates. "linear" and "cosine" go
    from the factor of the phase before to this one's; "constant" holds this one's from its first update.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    until: float = Field(gt=0)
    unit: Literal["steps", "tokens", "share"] = "share"
    factor: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _share_is_a_share(self) -> Self:
        if self.unit == "share" and self.until > 1:
            raise ValueError(
                f"until is {self.until:g}; a share of the run is at most 1 (or set unit to steps or tokens)"
            )
        return self


class Schedule(Settings):
    """A number that changes during a run: `peak` times the factor of the phase the run is in.

    The factor starts at `start` and stays at the last phase's when the phases have ended. A plain number, in YAML or
    on the command line, is a schedule that never changes.
    """

    peak: float = Field(ge=0)
    start: float = Field(1.0, ge=0)
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="after")
    def _moving_phases_have_a_start(self) -> Self:
        for before, phase in zip(self.phases, self.phases[1:], strict=False):
            same = before.unit == phase.unit
            if same and phase.until <= before.until:
                raise ValueError(f"phases must end one after another, but {phase.until:g} follows {before.until:g}")
            if not same and phase.shape != "constant":
                raise ValueError(
                    f"a {phase.shape} phase counted in {phase.unit} follows one counted in {before.unit}, so where it "
                    "starts is unknown; count both alike, or put a constant phase between"
                )
        return self


def _plain_number(value: Any) -> Any:
    # YAML 1.1 takes 1e-3 for text, so text counts as a number here; pydantic says so when it is none.
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return {"peak": value} if is_plain else value


Scheduled = Annotated[Schedule, BeforeValidator(_plain_number)]


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


class EvaluationConfig(Settings):
    """Validation on held-out text: every `every` updates and at the end, on at most `max_tokens` tokens."""

    every: Positive = 1000
    max_tokens: Positive | None = None
    final_max_tokens: Positive | None = None
    """The same bound for the validation that ends the run; None reads all held-out text."""
    micro_sequences: Positive = 1


class SamplingConfig(Settings):
    """Completions written to the log and to `samples.jsonl` every `every` updates; no prompts, no samples."""

    every: Positive = 1000
    prompts: tuple[str, ...] = ()
    max_tokens: Positive = 64
    temperature: float = Field(0.0, ge=0)


class CheckpointConfig(Settings):
    """When the whole training state is saved, and how many saves are kept (None keeps all)."""

    every: Positive = 1000
    keep: Positive | None = 2
    export_weights: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Number format of the finished model folder."""
    asynchronous: bool = False
    """Whether training goes on while a state is written, from a copy in the processor's memory; one save at a time."""
    export_average: bool = False
    """Whether the finished model holds the averaged weights (optimizer.ema_decay) or the last ones."""


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


class LoggingConfig(Settings):
    """How often a row goes to `metrics.jsonl`, and expert loads to `routing/`."""

    every: Positive = 10
    routing_every: Positive = 100


class TrainConfig(Settings):
    """One run. `steps` is the number of updates; `name` heads the model card and names the folder if nothing else does.

    `start_from` is a model folder whose weights the run begins with: continued pretraining, or context extension when
    `model` states a longer rotary embedding. None begins with random ones, drawn from `seed`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: ModelConfig
    data: DataConfig
    steps: Positive
    start_from: str | None = None
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    balance: BalanceConfig = BalanceConfig()
    prediction: PredictionConfig = PredictionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    logging: LoggingConfig = LoggingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _named_model(cls, value: Any) -> Any:
        return ModelConfig.from_pretrained(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        model, length = self.model, self.data.sequence_length
        if length > model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length is {length}, but model.max_position_embeddings is "
                f"{model.max_position_embeddings}"
            )
        if length <= model.num_nextn_predict_layers:
            raise ValueError(
                f"data.sequence_length is {length}; {model.num_nextn_predict_layers} prediction layers need more"
            )
        if self.data.tokenizer is None and self.data.vocab_size > model.vocab_size:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}, but model.vocab_size is only {model.vocab_size}"
            )
        if model.n_routed_experts and model.num_experts_per_tok == 1 and model.norm_topk_prob:
            raise ValueError(
                "model.norm_topk_prob divides a single chosen expert's weight by itself: it is always 1 and the router "
                "gets no gradient; set norm_topk_prob to false for num_experts_per_tok 1 (Switch)"
            )
        if self.start_from is not None and self.data.tokenizer is None:
            raise ValueError(
                "start_from needs data.tokenizer, usually the same folder: ids of a newly trained tokenizer would mean "
                "other text to that model"
            )
        if self.checkpoint.export_average and self.optimizer.ema_decay is None:
            raise ValueError("checkpoint.export_average needs optimizer.ema_decay")
        if self.memory.offload_average and self.optimizer.ema_decay is None:
            raise ValueError("memory.offload_average needs optimizer.ema_decay: no average is kept without it")
        return self

    @model_validator(mode="after")
    def _groups_are_balanced_where_there_are_any(self) -> Self:
        model, balance = self.model, self.balance
        if balance.device_alpha and model.n_group == 1:
            raise ValueError(
                f"balance.device_alpha is {balance.device_alpha:g}; it balances groups of experts, and model.n_group "
                "is 1: the loss would be the same whatever the load"
            )
        if balance.communication_alpha and model.topk_group == model.n_group:
            raise ValueError(
                f"balance.communication_alpha is {balance.communication_alpha:g}; it balances what groups of experts "
                f"are sent where a token reaches few of them, and model.topk_group is all {model.n_group}"
            )
        return self

    @model_validator(mode="after")
    def _narrow_moments_move(self) -> Self:
        for name in ("beta1", "beta2") if self.precision.moments == "bfloat16" else ():
            beta = getattr(self.optimizer, name)
            if 1 - beta < BFLOAT16_STEP:
                raise ValueError(
                    f"optimizer.{name} is {beta:g}; moments in bfloat16 need at most {1 - BFLOAT16_STEP:g}, since a "
                    "smaller move than half their spacing is rounded away; or set precision.moments to float32"
                )
        return self

    @model_validator(mode="after")
    def _a_processor_has_nowhere_to_move_to(self) -> Self:
        if self.device != "cpu":
            return self
        for name in ("offload_average", "offload_optimizer"):
            if getattr(self.memory, name):
                raise ValueError(f"memory.{name} moves things from a GPU to the processor, and device is cpu")
        return self

    @model_validator(mode="after")
    def _ranks_split_what_one_gpu_moves_away(self) -> Self:
        if self.memory.offload_optimizer and self.parallel.world > 1:
            raise ValueError(
                f"memory.offload_optimizer is for one GPU, and the layout has {self.parallel.world} ranks; "
                "parallel.shard splits moments and master weights over them instead"
            )
        return self

    def to_yaml(self) -> str:
        """The text of `config.yaml`: every field, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The config a YAML file states. Raises ConfigError naming file and field."""
        path = Path(path)
        data = read_yaml(read_text(path, "training config"), str(path))
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, not a mapping of settings")
        try:
            return cls(**data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", error.hint) from None

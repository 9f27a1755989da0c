"""TrainConfig: everything a pretraining run depends on, frozen, written to `config.yaml` and read back unchanged.

A recipe is a function that returns one. What makes an update is in config/update.py, numbers that change during a run
are in config/schedule.py; what happens between updates is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig, Positive
from benthic.config.parallel import ParallelConfig
from benthic.config.schedule import Phase, Schedule
from benthic.config.settings import Settings, read_text
from benthic.config.update import (
    BalanceConfig,
    BatchConfig,
    MemoryConfig,
    OptimizerConfig,
    PrecisionConfig,
    PredictionConfig,
)
from benthic.config.yaml_text import read_yaml
from benthic.errors import ConfigError

__all__ = [
    "BalanceConfig",
    "BatchConfig",
    "CheckpointConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MemoryConfig",
    "OptimizerConfig",
    "Phase",
    "PrecisionConfig",
    "PredictionConfig",
    "SamplingConfig",
    "Schedule",
    "TrainConfig",
]

Seed = Annotated[int, Field(ge=0, lt=2**63)]

BFLOAT16_STEP = 2**-8
"""Least share by which a bfloat16 number moves whatever its mantissa: half the widest spacing."""


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

"""ParallelConfig: how a model and its batch are laid over GPUs.

The dense mesh is pipeline x replicate x shard x context x tensor. Expert parallelism takes no ranks of its own: inside
one pipeline stage the ranks that hold different tokens (replicate x shard x context) or different columns (tensor)
are regrouped as `expert` ranks, and what is left over holds copies of the same experts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from benthic.config.model import ModelConfig, Positive
from benthic.config.settings import Settings
from benthic.errors import ConfigError, did_you_mean

Schedule = Literal["1f1b", "gpipe", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]
LOOPED = ("interleaved", "zb1p")
"""Schedules that may give a rank several stages, each as many as pipeline ranks further on."""
MIRRORED = ("zbv", "dualpipe", "dualpipev")
"""Schedules that give a rank two stages, the second as far from the end as the first from the beginning."""
Zero = Annotated[int, Field(ge=0, le=3)]

_SHORT_NAMES = {
    "dp": "replicate",
    "fsdp": "shard",
    "ep": "expert",
    "pp": "pipeline",
    "tp": "tensor",
    "cp": "context",
    "vp": "chunks",
}


class ParallelConfig(Settings):
    """Ranks along each axis; 1 switches an axis off.

    `shard` ranks split what `zero` names: 1 optimiser states (master weights, moments), 2 gradients too, 3 parameters
    too (FSDP). `replicate` is the number of such groups. `chunks` is the number of stages a rank holds in the
    interleaved schedules ("interleaved" is 1F1B, "zb1p" zero-bubble); those that run through the ranks and back,
    "zbv", "dualpipe" and "dualpipev", always hold two.
    """

    replicate: Positive = 1
    shard: Positive = 1
    zero: Zero = 3
    expert: Positive = 1
    pipeline: Positive = 1
    schedule: Schedule = "1f1b"
    chunks: Positive = 1
    tensor: Positive = 1
    context: Positive = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ranks_in_stage % self.expert:
            raise ValueError(
                f"expert is {self.expert}; it must divide the ranks of one pipeline stage, replicate x shard x context "
                f"x tensor = {self.ranks_in_stage}"
            )
        if self.schedule == "interleaved" and self.chunks < 2:
            raise ValueError(f"chunks is {self.chunks}; the interleaved schedule needs at least 2 stages on each rank")
        if self.schedule not in LOOPED and self.chunks != 1:
            raise ValueError(
                f"chunks is {self.chunks}, which belongs to schedules 'interleaved' and 'zb1p', not {self.schedule!r}"
            )
        if self.schedule == "dualpipe" and self.pipeline % 2:
            raise ValueError(f"pipeline is {self.pipeline}; dualpipe feeds both ends, so it must be even")
        return self

    @classmethod
    def parse(cls, text: str) -> ParallelConfig:
        """A layout written as "pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64"; long names work as well."""
        values: dict[str, Any] = {}
        names = [*cls.model_fields, *_SHORT_NAMES]
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not value:
                raise ConfigError(f"layout item {item!r} is not NAME=VALUE", hint="for example: pp=16,fsdp=128,ep=64")
            field = _SHORT_NAMES.get(name, name)
            if field not in cls.model_fields:
                raise ConfigError(f"unknown layout axis {name!r} in {text!r}", hint=did_you_mean(name, names))
            if field in values:
                raise ConfigError(f"layout axis {field!r} is given twice in {text!r}", hint="state each axis once")
            values[field] = value
        return cls(**values)

    def __str__(self) -> str:
        short = {long: short for short, long in _SHORT_NAMES.items()}
        items = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            needless = (name == "schedule" and self.pipeline == 1) or (name == "zero" and self.shard == 1)
            if (value != field.default and not needless) or (name == "zero" and self.shard > 1):
                items.append(f"{short.get(name, name)}={value}")
        return ",".join(items) or "one GPU"

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.replicate * self.shard

    @property
    def ranks_in_stage(self) -> int:
        """Ranks that hold the same layers."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.pipeline * self.ranks_in_stage

    @property
    def expert_copies(self) -> int:
        """Ranks of a stage that hold the same experts."""
        return self.ranks_in_stage // self.expert

    @property
    def dense_shards(self) -> int:
        """Ranks over which ZeRO splits what is no routed expert; context ranks hold the same weights, so they count."""
        return self.shard * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks over which ZeRO splits a rank's routed experts: copies within one replica, where they come out even."""
        inside = self.dense_shards * self.tensor
        return inside // self.expert if inside % self.expert == 0 else 1

    @property
    def lone_experts(self) -> bool:
        """Whether no other rank holds what a rank has of the routed experts, though there are others."""
        return self.expert_copies == 1 and (self.expert > 1 or self.tensor > 1)

    @property
    def stages_per_rank(self) -> int:
        """Parts of the model a rank holds: 2 in the schedules that run through the ranks and back."""
        return 2 if self.schedule in MIRRORED and self.pipeline > 1 else self.chunks

    @property
    def stages(self) -> int:
        """Parts the layers are cut into. DualPipe holds each of its parts twice, at mirrored ranks."""
        if self.schedule == "dualpipe":
            return self.pipeline
        return self.pipeline * self.stages_per_rank

    @property
    def micro_batch_unit(self) -> int:
        """How many micro-batches the schedule takes at a time."""
        each = {"dualpipe": 2, "interleaved": self.pipeline, "zb1p": self.pipeline}
        return each.get(self.schedule, 1) if self.pipeline > 1 else 1

    @property
    def least_micro_batches(self) -> int:
        """How many micro-batches the schedule needs."""
        return self.pipeline if self.schedule == "1f1b" else 1

    def schedule_for(self, micro_batches: int) -> Schedule:
        """The schedule of an update of so many micro-batches a rank: fewer than DualPipeV's 2 x pipeline go through
        its stages, which lie on the same ranks, as zero-bubble V."""
        few = self.schedule == "dualpipev" and micro_batches < 2 * self.pipeline
        return "zbv" if few else self.schedule

    def check_model(self, config: ModelConfig) -> None:
        """Raise ConfigError naming the axis that does not fit the model, and the values that would."""
        _must_divide("tensor", self.tensor, "num_attention_heads", config.num_attention_heads)
        if not config.kv_lora_rank:
            _must_divide("tensor", self.tensor, "num_key_value_heads", config.num_key_value_heads)
        _must_divide("tensor", self.tensor, "vocab_size", config.vocab_size)
        _must_divide("tensor", self.tensor, "intermediate_size", config.intermediate_size)
        if config.n_routed_experts and config.n_shared_experts:
            shared = config.moe_intermediate_size * config.n_shared_experts
            _must_divide("tensor", self.tensor, "n_shared_experts x moe_intermediate_size", shared)
        if config.n_routed_experts:
            _must_divide("expert", self.expert, "n_routed_experts", config.n_routed_experts)
        elif self.expert > 1:
            raise ConfigError(f"expert is {self.expert}, but the model has no routed experts; it must be 1")
        # Prediction layers stay together: the first of them reads what the head reads.
        blocks = config.num_hidden_layers + min(1, config.num_nextn_predict_layers)
        if self.stages > blocks:
            raise ConfigError(
                f"the layout cuts the model into {self.stages} stages, but it has only {blocks} layers",
                hint=f"pipeline x stages on a rank can be at most {blocks}",
            )

    def check_batch(self, sequences: int, micro_batch: int, sequence_length: int) -> int:
        """Micro-batches a rank works through for a batch of `sequences`; ConfigError where that is no whole number."""
        share = self.data * micro_batch
        if sequences < 1 or sequences % share:
            raise ConfigError(
                f"a batch of {sequences} sequences does not divide into micro-batches of {micro_batch} over "
                f"{self.data} data-parallel ranks",
                hint=f"use a multiple of {share}, for example {max(1, round(sequences / share)) * share}",
            )
        # Causal work is evened out by giving a rank an early and a late piece of each sequence.
        pieces = 2 * self.context if self.context > 1 else 1
        if sequence_length < 1 or sequence_length % pieces:
            raise ConfigError(
                f"sequence_length is {sequence_length}; context parallelism over {self.context} ranks cuts it into "
                f"{pieces} pieces, which must come out even"
            )
        if sequence_length // self.context % self.tensor:
            raise ConfigError(
                f"sequence_length is {sequence_length}; a rank's {sequence_length // self.context} positions of it "
                f"are split over {self.tensor} tensor ranks, which must come out even"
            )
        count = sequences // share
        unit, least = self.micro_batch_unit, self.least_micro_batches
        if count % unit:
            raise ConfigError(
                f"{count} micro-batches a rank do not suit schedule {self.schedule!r}, which takes them {unit} at a "
                f"time",
                hint=f"use a batch that is a multiple of {share * unit} sequences",
            )
        if count < least:
            raise ConfigError(
                f"{count} micro-batches a rank do not fill schedule {self.schedule!r}, which needs {least} or more",
                hint=f"use a batch of at least {share * least} sequences",
            )
        return count


def _must_divide(axis: str, size: int, name: str, total: int) -> None:
    if total % size:
        allowed = [str(n) for n in range(1, min(total, 1024) + 1) if total % n == 0]
        shown = ", ".join(allowed[:12]) + (", ..." if len(allowed) > 12 else "")
        raise ConfigError(f"{axis} is {size}; it must divide {name} ({total})", hint=f"{axis} may be {shown}")

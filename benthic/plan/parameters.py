"""How many parameters a config implies, by part, and how many bytes its weights take.

Everything is summed from the manifest, so that a count here and a tensor in a checkpoint cannot disagree. The main
model and its prediction (MTP) layers are kept apart: published totals ("671B") leave prediction out, published
folders ("685B") hold it, with copies of embedding and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from benthic.config import ModelConfig
from benthic.config.manifest import Parameter, parameters

WeightFormat = Literal["fp32", "bf16", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "fp8")
PARTS = ("embedding", "head", "attention", "dense", "routed", "shared", "router", "norm")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Elements of the main model by part, and of the prediction layers.

    The parts add up to `total`. `attention` includes the norms of its latents or queries and keys; `head` is 0 when
    it is tied to the embedding. `mtp_unique` counts the prediction layers' own tensors, `mtp_stored` adds the copies
    of embedding and head that a published folder repeats for each of them.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    routed: int
    shared: int
    router: int
    norm: int
    routed_active: int
    mtp_unique: int
    mtp_stored: int
    mtp_active: int

    @property
    def total(self) -> int:
        """Parameters of the main model."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def active(self) -> int:
        """Parameters one token uses: everything but the experts it is not sent to. Counts both vocabulary matrices."""
        return self.total - self.routed + self.routed_active

    @property
    def active_without_input_embedding(self) -> int:
        """`active` without the table that is only looked up; a tied table stays, for it is the head."""
        return self.active - self.embedding if self.head else self.active

    @property
    def stored(self) -> int:
        """Parameters of a published folder."""
        return self.total + self.mtp_stored


@dataclass(frozen=True, slots=True)
class RepeatedParameter:
    """A parameter that `count` layers hold alike; `name` leaves the layer's number out."""

    row: Parameter
    name: str
    count: int
    is_prediction: bool

    @property
    def part(self) -> str:
        """The part it is counted under: norms inside attention belong to attention."""
        return "attention" if self.name.startswith("self_attn.") else self.row.part


@lru_cache(maxsize=64)
def repeated_parameters(config: ModelConfig) -> tuple[RepeatedParameter, ...]:
    """The manifest with equal layers folded into one row each."""
    found: dict[tuple, RepeatedParameter] = {}
    for row in parameters(config):
        name = row.name if row.layer is None else row.name.removeprefix(f"model.layers.{row.layer}.")
        is_prediction = row.layer is not None and row.layer >= config.num_hidden_layers
        key = (name, row.shape, is_prediction)
        seen = found.get(key)
        found[key] = RepeatedParameter(row, name, seen.count + 1 if seen else 1, is_prediction)
    return tuple(found.values())


def active_size(config: ModelConfig, row: Parameter) -> int:
    """Elements of a parameter that one token uses: K of E experts, all of anything else."""
    return row.size * config.num_experts_per_tok // config.n_routed_experts if row.part == "routed" else row.size


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count a model by part."""
    counts = dict.fromkeys((*PARTS, "routed_active", "mtp_unique", "mtp_active"), 0)
    for one in repeated_parameters(config):
        size, active = one.count * one.row.size, one.count * active_size(config, one.row)
        if one.is_prediction:
            counts["mtp_unique"] += size
            counts["mtp_active"] += active
            continue
        counts[one.part] += size
        if one.part == "routed":
            counts["routed_active"] += active
    copies = 2 * config.vocab_size * config.hidden_size * config.num_nextn_predict_layers
    return ParameterCount(**counts, mtp_stored=counts["mtp_unique"] + copies)


def stored_format(config: ModelConfig) -> WeightFormat:
    """The format a published folder of this config has its matrices in."""
    if config.quantization_config:
        return "fp8"
    return "fp32" if config.dtype == "float32" else "bf16"


def row_bytes(config: ModelConfig, row: Parameter, weights: WeightFormat) -> int:
    """Bytes of one parameter; in FP8 every begun block of a quantised matrix adds a 4-byte scale."""
    if row.dtype == "float32" or weights == "fp32":
        return 4 * row.size
    if weights == "fp8" and row.fp8 and len(row.shape) > 1:
        height, width = config.quantization_config.weight_block_size if config.quantization_config else (128, 128)
        # An expert's gate and up are two matrices, each with blocks of its own.
        parts = 2 if row.name.endswith("gate_up_proj") else 1
        rows, columns = row.shape[-2] // parts, row.shape[-1]
        return row.size + 4 * (row.size // (rows * columns)) * -(-rows // height) * -(-columns // width)
    return 2 * row.size


def weight_bytes(config: ModelConfig, weights: WeightFormat, include_mtp: bool = False) -> int:
    """Bytes of the weights as a process holds them: embedding and head once, prediction layers if asked for."""
    rows = (one for one in repeated_parameters(config) if include_mtp or not one.is_prediction)
    return sum(one.count * row_bytes(config, one.row, weights) for one in rows)


def stored_bytes(config: ModelConfig, weights: WeightFormat) -> int:
    """Bytes of the weights as a published folder holds them, copies of embedding and head included."""
    copies = 2 * config.vocab_size * config.hidden_size * config.num_nextn_predict_layers
    return weight_bytes(config, weights, include_mtp=True) + copies * (4 if weights == "fp32" else 2)

"""A model into a published folder: per-expert names, prediction layers with their copies, fp32, bf16 or FP8.

What every file will hold is arithmetic on the manifest (`plan_folder`), so the sizes are known before the first byte
and tensors stream through one at a time (`write_folder`). transformers, vLLM and SGLang read the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benthic.checkpoint.folder import CONFIG, INDEX, WEIGHTS, Entry, named_list, total_bytes
from benthic.checkpoint.layout import DEFAULT_BLOCK, FP8, SCALE_SUFFIX, scale_shape
from benthic.checkpoint.shard import TORCH_DTYPES, ShardWriter
from benthic.checkpoint.staging import staged
from benthic.config.manifest import StoredTensor, parameters, stored_tensors
from benthic.config.model import Fp8Quantization, ModelConfig
from benthic.config.published import config_to_published, read_json
from benthic.errors import CheckpointError, NumericsError
from benthic.files import write_atomic
from benthic.log import logger
from benthic.numerics.reference.quantisation import quantise_blocks

WeightFormat = Literal["fp32", "bf16", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "fp8")
MAX_SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"

Produce = Callable[[StoredTensor], Iterator[tuple[str, Tensor]]]
"""Gives, for a row of the manifest, the tensors that the plan announced for it."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How weights lie on disk."""

    weights: WeightFormat = "bf16"
    power_of_two_scales: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise CheckpointError(f"weights is {self.weights!r}; allowed: {', '.join(WEIGHT_FORMATS)}")
        if self.power_of_two_scales and self.weights != "fp8":
            raise CheckpointError(f"power-of-two scales belong to fp8 weights; weights is {self.weights!r}")

    def configured(self, config: ModelConfig) -> ModelConfig:
        """`config` with the dtype and quantisation of this encoding."""
        scale_format = "ue8m0" if self.power_of_two_scales else None
        quantised = Fp8Quantization(weight_block_size=DEFAULT_BLOCK, scale_fmt=scale_format)
        return config.replace(
            dtype="float32" if self.weights == "fp32" else "bfloat16",
            quantization_config=quantised if self.weights == "fp8" else None,
        )

    def entries(self, row: StoredTensor) -> list[Entry]:
        """What `row` becomes on disk, without a file yet: one tensor, or values and scales."""
        if self._is_quantised(row):
            scales = scale_shape(row.shape, DEFAULT_BLOCK)
            return [Entry(row.name, FP8, row.shape, ""), Entry(row.name + SCALE_SUFFIX, "F32", scales, "")]
        wide = self.weights == "fp32" or row.source.dtype == "float32"
        return [Entry(row.name, "F32" if wide else "BF16", row.shape, "")]

    def encode(self, row: StoredTensor, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `entries`, from the weight as numbers."""
        if not self._is_quantised(row):
            yield row.name, tensor.to(TORCH_DTYPES[self.entries(row)[0].dtype])
            return
        try:
            values, scale_inv = quantise_blocks(tensor, DEFAULT_BLOCK, self.power_of_two_scales)
        except NumericsError as error:
            raise NumericsError(f"{row.name}: {error.message}", hint="save as bf16 to look into it") from None
        yield row.name, values
        yield row.name + SCALE_SUFFIX, scale_inv

    def _is_quantised(self, row: StoredTensor) -> bool:
        return self.weights == "fp8" and row.source.fp8


@torch.no_grad()
def write_checkpoint(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    weights: WeightFormat = "bf16",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    power_of_two_scales: bool = False,
) -> None:
    """Write `tensors`, named and stacked as in the manifest (a model's state_dict), as a published folder.

    Files of an existing folder that are no weights stay (tokenizer, model card). All or nothing: on any error the
    folder is as before. Raises CheckpointError naming tensors that are missing, unknown or misshapen, NumericsError
    for non-finite weights when quantising, CapacityError when the disk is full.
    """
    encoding = Encoding(weights, power_of_two_scales)
    _check_tensors(tensors, config)

    def produce(row: StoredTensor) -> Iterator[tuple[str, Tensor]]:
        tensor = tensors[row.source.name].detach()
        if row.expert is not None:
            tensor = tensor[row.expert, row.first_row : row.first_row + row.shape[0]]
        yield from encoding.encode(row, tensor)

    plan = plan_folder([(row, encoding.entries(row)) for row in stored_tensors(config)], max_shard_bytes)
    documents = {CONFIG: config_to_published(encoding.configured(config))}
    generation = _generation_config(config, Path(folder))
    if generation:
        documents[GENERATION_CONFIG] = generation
    write_folder(Path(folder), plan, produce, documents)


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one file and the tensors they become."""

    rows: tuple[StoredTensor, ...]
    entries: tuple[Entry, ...]


def plan_folder(rows: Sequence[tuple[StoredTensor, list[Entry]]], max_shard_bytes: int) -> list[Shard]:
    """Cut `rows` into shards of at most `max_shard_bytes`, in order; a weight and its scales stay together.

    A tensor that is larger than the limit gets a shard of its own.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    groups: list[list[tuple[StoredTensor, list[Entry]]]] = [[]]
    filled = 0
    for row, entries in rows:
        size = total_bytes(entries)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((row, entries))
        filled += size
    shards = []
    for number, group in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        named = [Entry(one.name, one.dtype, one.shape, file) for _, entries in group for one in entries]
        shards.append(Shard(tuple(row for row, _ in group), tuple(named)))
    return shards


def write_folder(
    folder: Path,
    shards: Sequence[Shard],
    produce: Produce,
    documents: Mapping[str, dict[str, Any]],
    *,
    copies: Sequence[Path] = (),
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `shards`, the index that several of them need, JSON `documents` and `copies` of files, all or nothing.

    `progress` is told the bytes of each tensor once it is written.
    """
    num_bytes = sum(total_bytes(shard.entries) for shard in shards)
    with staged(folder, num_bytes + sum(path.stat().st_size for path in copies)) as stage:
        for shard in shards:
            with ShardWriter(stage / shard.entries[0].file, shard.entries) as file:
                for row in shard.rows:
                    for name, tensor in produce(row):
                        file.write(name, tensor)
                        progress(tensor.nbytes)
        if len(shards) > 1:
            weight_map = {entry.name: entry.file for shard in shards for entry in shard.entries}
            _write_json(stage / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        for name, document in documents.items():
            _write_json(stage / name, document)
        for path in copies:
            write_atomic(stage / path.name, path.read_bytes(), CheckpointError)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n", CheckpointError)


def _check_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    rows = {row.name: row for row in parameters(config)}
    tied_head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in rows if name not in tensors]
    unknown = sorted(set(tensors) - set(rows) - tied_head)
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(row.shape)}"
        for name, row in rows.items()
        if name in tensors and tuple(tensors[name].shape) != row.shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    lines = [f"{len(names)} {kind}: {named_list(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise CheckpointError("the tensors to save are not those of their config:\n  " + "\n  ".join(lines))
    rounded = [name for name, row in rows.items() if row.dtype == "float32" and tensors[name].dtype != torch.float32]
    if rounded:
        logger.warning(
            f"{named_list(rounded)} were cast from float32 before saving, which rounded them; they are stored as "
            "float32, but what was rounded off is lost"
        )


def _generation_config(config: ModelConfig, folder: Path) -> dict[str, Any] | None:
    """Token ids for engines that generate, over whatever the folder's own file says beside them."""
    if config.eos_token_id is None:
        return None
    kept = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return kept | {name: value for name, value in ids.items() if value is not None}

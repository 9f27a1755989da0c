"""What a folder's tensors must be for its config, and every way in which they are not; no torch.

The manifest states the tensors; this adds what is allowed beside them: FP8 weights with their scales, prediction
layers without their copies of embedding and head, a stored head of a tied model, rotary tables of old files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benthic.checkpoint.folder import Entry, named_list
from benthic.config.manifest import StoredTensor, parameters, stored_tensors
from benthic.config.model import ModelConfig
from benthic.errors import CheckpointError
from benthic.log import logger

SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16", FP8)
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
DEFAULT_BLOCK = (128, 128)
# Tables that modelling code of 2023 stored; they follow from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Faults:
    """Names of tensors that are absent, unknown, of the wrong shape or dtype. Falsy when there are none."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    mistyped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.misshapen, self.mistyped))

    def lines(self, limit: int = 8) -> list[str]:
        """One line a kind of fault: its exact count and the first `limit` names."""
        kinds = ("missing", "unexpected", "misshapen", "mistyped")
        found = [(kind, getattr(self, kind)) for kind in kinds if getattr(self, kind)]
        return [f"{len(names)} {kind}: {named_list(names, limit)}" for kind, names in found]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight: one a block, ragged blocks included."""
    return tuple(-(-size // length) for size, length in zip(shape, block, strict=True))


def block_size(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    return config.quantization_config.weight_block_size if config.quantization_config else DEFAULT_BLOCK


def present_rows(config: ModelConfig, entries: Mapping[str, Entry]) -> Iterator[StoredTensor]:
    """The manifest's rows, without duplicates that the folder leaves out, with a tied model's head where stored."""
    for row in stored_tensors(config):
        if not row.duplicate or row.name in entries:
            yield row
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        embedding = next(parameters(config))
        yield StoredTensor("lm_head.weight", embedding.shape, embedding, duplicate=True)


def find_faults(config: ModelConfig, entries: Mapping[str, Entry]) -> Faults:
    """Compare `entries` with the manifest of `config`."""
    missing, misshapen, mistyped = [], [], []
    known = set()
    block = block_size(config)
    for row in present_rows(config, entries):
        known.add(row.name)
        entry = entries.get(row.name)
        if entry is None:
            missing.append(row.name)
            continue
        if entry.shape != row.shape:
            misshapen.append(f"{row.name} {list(entry.shape)} instead of {list(row.shape)}")
        is_fp8 = entry.dtype == FP8
        if entry.dtype not in WEIGHT_DTYPES or (is_fp8 and len(row.shape) != 2):
            mistyped.append(f"{row.name} {entry.dtype}")
        elif is_fp8:
            scale_name = row.name + SCALE_SUFFIX
            known.add(scale_name)
            scale = entries.get(scale_name)
            wanted = scale_shape(row.shape, block)
            if scale is None:
                missing.append(scale_name)
            elif scale.shape != wanted:
                misshapen.append(f"{scale_name} {list(scale.shape)} instead of {list(wanted)}")
            if scale is not None and scale.dtype not in SCALE_DTYPES:
                mistyped.append(f"{scale_name} {scale.dtype}")
    unexpected = [name for name in entries if name not in known and not name.endswith(_DERIVED_SUFFIX)]
    return Faults(tuple(missing), tuple(sorted(unexpected)), tuple(misshapen), tuple(mistyped))


def refuse_faults(faults: Faults, config: ModelConfig, folder: Path) -> None:
    """Raise one CheckpointError that names every kind of fault."""
    if not faults:
        return
    first_prediction = f"model.layers.{config.num_hidden_layers}."
    hint = f"`benthic inspect {folder}` lists them all"
    if any(name.startswith(first_prediction) for name in faults.unexpected):
        hint += (
            f"; the folder holds prediction layers, but config.json says num_nextn_predict_layers "
            f"{config.num_nextn_predict_layers}"
        )
    raise CheckpointError(
        f"the tensors in {folder} do not match its config.json:\n  " + "\n  ".join(faults.lines()), hint=hint
    )


def without_absent_predictions(config: ModelConfig, entries: Mapping[str, Entry], folder: Path) -> ModelConfig:
    """`config`, or the config of the main model alone when the folder has no tensor of any prediction layer.

    transformers drops the prediction layers when it saves and leaves their count in config.json, so such a folder is
    a complete main model. One that holds some of their tensors is broken, and stays for `find_faults`.
    """
    count = config.num_nextn_predict_layers
    layers = range(config.num_hidden_layers, config.num_hidden_layers + count)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    if not count or any(name.startswith(prefixes) for name in entries):
        return config
    logger.warning(
        f"{folder}: config.json says num_nextn_predict_layers {count}, but the weights hold no prediction layer "
        "(transformers leaves them out when it saves); it is taken as the main model alone"
    )
    return config.replace(num_nextn_predict_layers=0)

"""A published folder into another: FP8 to and from bf16 and fp32, shards to and from one file.

Tensors stream from the source's files to the target's one by one and no model is built, so checkpoints larger than
memory pass. FP8 values whose scales already are of the wanted kind are copied as they are, never rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benthic.checkpoint.folder import CONFIG, INDEX
from benthic.checkpoint.layout import DEFAULT_BLOCK, FP8, SCALE_SUFFIX, block_size, present_rows
from benthic.checkpoint.reader import Checkpoint, TensorReader, open_checkpoint
from benthic.checkpoint.writer import MAX_SHARD_BYTES, Encoding, WeightFormat, plan_folder, write_folder
from benthic.config.manifest import StoredTensor
from benthic.config.published import read_json
from benthic.errors import CheckpointError
from benthic.log import logger

MAX_COPIED_BYTES = 100 * 10**6
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

Progress = Callable[[int, int], None]


def convert(
    source: str | Path,
    target: str | Path,
    weights: WeightFormat,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    power_of_two_scales: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the checkpoint of folder `source` to the new folder `target` in another weight format or sharding.

    config.json keeps everything but dtype and quantisation; tokenizer and other small files are copied. `target`
    appears when it is complete. A source with power-of-two scales keeps them. `progress` is told bytes done and total.
    """
    source, target = Path(source), Path(target)
    _refuse_used_target(source, target)
    checkpoint = open_checkpoint(source)
    quantised = checkpoint.config.quantization_config
    was_power_of_two = quantised is not None and quantised.scale_fmt == "ue8m0"
    encoding = Encoding(weights, power_of_two_scales or (was_power_of_two and weights == "fp8"))
    is_same_kind = encoding.power_of_two_scales == was_power_of_two and block_size(checkpoint.config) == DEFAULT_BLOCK
    rows = list(present_rows(checkpoint.config, checkpoint.entries))
    shards = plan_folder([(row, encoding.entries(row)) for row in rows], max_shard_bytes)
    total = sum(entry.num_bytes for shard in shards for entry in shard.entries)
    done = 0

    def tell(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    with TensorReader(checkpoint) as reader:

        def produce(row: StoredTensor) -> Iterator[tuple[str, Tensor]]:
            wanted = encoding.entries(row)[0].dtype
            if wanted == FP8 == checkpoint.entries[row.name].dtype and is_same_kind:
                yield row.name, reader.stored(row.name)
                yield row.name + SCALE_SUFFIX, reader.stored(row.name + SCALE_SUFFIX).float()
            else:
                yield from encoding.encode(row, reader.weight(row.name))

        documents = {CONFIG: _converted_config(checkpoint, encoding)}
        write_folder(target, shards, produce, documents, copies=_small_files(source), progress=tell)


def _refuse_used_target(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise CheckpointError(f"source and target are both {source}", hint="name a new folder as target")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder", hint="name a new folder as target")


def _converted_config(checkpoint: Checkpoint, encoding: Encoding) -> dict[str, Any]:
    """The source's config.json in its own spelling, with what the new encoding changes."""
    data = read_json(checkpoint.folder / CONFIG)
    configured = encoding.configured(checkpoint.config)
    data["torch_dtype" if "torch_dtype" in data else "dtype"] = configured.dtype
    data.pop("quantization_config", None)
    if configured.quantization_config:
        data["quantization_config"] = configured.quantization_config.model_dump(mode="json", exclude_none=True)
    for spelling in ("num_nextn_predict_layers", "num_mtp_layers"):
        if spelling in data:
            data[spelling] = configured.num_nextn_predict_layers
    return data


def _small_files(source: Path) -> list[Path]:
    """Tokenizer, model card and the like: visible files that are no weights."""
    found = []
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if not path.is_file() or is_weight or path.name in (CONFIG, INDEX) or path.name.startswith("."):
            continue
        if path.stat().st_size > MAX_COPIED_BYTES:
            logger.warning(f"{path} ({path.stat().st_size:,} bytes) is too large for a tokenizer's file; not copied")
            continue
        found.append(path)
    return found

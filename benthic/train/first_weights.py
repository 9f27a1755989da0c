"""What a run's weights are before its first update."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benthic.checkpoint import Checkpoint, load_into, open_checkpoint, read_weights
from benthic.config.model import ModelConfig
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError
from benthic.log import logger
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import Part, local, parts
from benthic.parallel.world import World
from benthic.train.distributed import compute_dtype


@torch.no_grad()
def set_first_weights(model: LanguageModel, config: TrainConfig, world: World) -> None:
    """Those of another model's folder, or random ones.

    Raises ConfigError where that model computes otherwise than this run's.
    """
    if config.start_from is not None:
        checkpoint = open_checkpoint(config.start_from)
        _refuse_other_mathematics(checkpoint.config, config.model, config.start_from)
        if world.size == 1:
            load_into(model, checkpoint)
        else:
            _load_blocks(model, checkpoint, parts(config.model, world))
        logger.info("weights of %s", config.start_from)
        return
    initialise(model, config.seed, parts(config.model, world))
    # One process draws its weights in the type it computes in; masters that FSDP keeps begin with the same.
    for parameter in model.parameters():
        local(parameter).copy_(local(parameter).to(compute_dtype(config)))


def _load_blocks(model: LanguageModel, checkpoint: Checkpoint, held: Mapping[str, Part]) -> None:
    """Fill the blocks that this rank holds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for row, stored in read_weights(checkpoint):
        part = held.get(row.source.name)
        if part is None or row.duplicate:
            continue
        target = local(tensors[row.source.name])
        if row.expert is None:
            target.copy_(stored[part.block])
            continue
        experts, rows, columns = part.block
        # Of an expert's rows, gate's before up's, those from `first` to `last` are this rank's.
        first, last = max(rows.start, row.first_row), min(rows.stop, row.first_row + row.shape[0])
        if row.expert in range(experts.start, experts.stop) and first < last:
            block = stored[first - row.first_row : last - row.first_row, columns]
            target[row.expert - experts.start, first - rows.start : last - rows.start].copy_(block)


def _refuse_other_mathematics(stored: ModelConfig, wanted: ModelConfig, folder: str) -> None:
    """Weights fit by their shapes alone; what else decides the numbers must be what they were trained with.

    Rotation and length may change (context extension), and what no forward pass reads.
    """
    free = {"rope_parameters", "max_position_embeddings", "initializer_range", "dtype", "quantization_config"}
    # A head's width is one of the shapes, whether it is stated or implied.
    free |= {"bos_token_id", "eos_token_id", "pad_token_id", "aux_loss_alpha", "seq_aux", "head_dim"}
    names = [name for name in ModelConfig.model_fields if name not in free]
    changed = [name for name in names if getattr(stored, name) != getattr(wanted, name)]
    if changed:
        told = "; ".join(f"{name} was {getattr(stored, name)!r}, is {getattr(wanted, name)!r}" for name in changed)
        raise ConfigError(
            f"the model in {folder} computes otherwise than this run's: {told}",
            hint=f"take model: {folder} in the config, and change its rotation and length alone",
        )

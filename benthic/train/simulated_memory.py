"""What a rank keeps between the micro-batches of an update, counted on the rank itself: its part of the model, laid out
by FSDP on the meta device, with the trainer's own optimiser and average."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benthic.config.train import TrainConfig
from benthic.model.float8 import copies_of
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import local
from benthic.parallel.world import World
from benthic.train.distributed import compute_dtype
from benthic.train.ema import Average
from benthic.train.optimizer import Optimizer
from benthic.train.step import routing_biases

BLOCK = 128
"""Rows and columns of a weight that share a scale in FP8."""


def kept(model: LanguageModel, config: TrainConfig, world: World, in_float8: Collection[str]) -> dict[str, float]:
    """Bytes by name, the planner's names (plan/memory.py): weights as they are used, gradients at the end of an update,
    masters, moments, average. Memory of the processor counts in, where a run keeps some of it there."""
    trained = dict(model.named_parameters())
    optimizer = Optimizer(model, config.optimizer, config.precision.moments, world=world)
    optimizer.updates = 1  # so that it shows its moments
    biases = routing_biases(model)
    found = {
        "weights": sum(_used(one, config) for one in trained.values()),
        "weights in FP8, both ways round": _narrow(model, in_float8),
        "routing biases": _bytes(*biases.values()),
        # Plain float32 weights are their own masters.
        "master weights": _bytes(
            *(master for name, master in optimizer.masters.items() if not _is_own_master(trained[name]))
        ),
        "moments": _bytes(*optimizer.moments().values()),
        "gradients": sum(_gradient(one, config) for one in trained.values()),
    }
    memory = config.memory
    if config.optimizer.ema_decay is not None and not (memory.offload_average or memory.offload_optimizer):
        weights = optimizer.masters | {str(layer): bias for layer, bias in biases.items()}
        found["averaged weights"] = _bytes(*Average(weights, config.optimizer.ema_decay).tensors.values())
    return {name: float(size) for name, size in found.items() if size}


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_own_master(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32 and not isinstance(parameter, DTensor)


def _used(parameter: nn.Parameter, config: TrainConfig) -> int:
    """A weight as it is multiplied with, where it stays: FSDP under ZeRO 3 gathers it for a while."""
    if not isinstance(parameter, DTensor):
        return _bytes(parameter)
    stays = config.parallel.zero < 3 or config.parallel.pipeline > 1
    return parameter.numel() * compute_dtype(config).itemsize * stays


def _gradient(parameter: nn.Parameter, config: TrainConfig) -> int:
    """float32 sums, split over ranks at once under ZeRO 2 and 3; whole until the last micro-batch under 0 and 1."""
    layout = config.parallel
    count = int(config.batch.sequences.peak) // (config.batch.micro_sequences * layout.data)
    if not isinstance(parameter, DTensor):
        return parameter.numel() * (4 if count > 1 else parameter.element_size())
    whole = layout.zero < 2 and (count > 1 or layout.pipeline > 1)
    return 4 * (parameter.numel() if whole else local(parameter).numel())


def _narrow(model: LanguageModel, in_float8: Collection[str]) -> float:
    """FP8 copies that live as long as an update, with a scale for each block of 128 x 128."""
    names = {id(one): name for name, one in model.named_parameters()}
    staying: dict[int, Tensor] = {}
    for module in model.modules():
        if any(copies.may_keep for copies in copies_of(module)):
            staying |= {id(one): one for one in module.parameters() if names[id(one)] in in_float8}
    return sum(2 * (one.numel() + 4 * _blocks(one.shape)) for one in staying.values())


def _blocks(shape: Sequence[int]) -> int:
    *stacked, rows, columns = shape
    return math.prod(stacked) * -(-rows // BLOCK) * -(-columns // BLOCK)

"""First values of a model's parameters, from the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from benthic.config.manifest import Parameter, parameters
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import Part, local


@torch.no_grad()
def initialise(model: LanguageModel, seed: int, parts: Mapping[str, Part] | None = None) -> None:
    """Fill every tensor: normal with config.initializer_range, ones or zeros, as the manifest says.

    Each tensor draws from a stream of its own, named by `seed` and its name, on the processor: the same values on
    every device, and for every model that has a tensor of that name and shape. A model that is spread over ranks
    keeps of them the `parts` that this rank holds.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for row in parameters(model.config):
        if parts is not None and row.name not in parts:
            continue
        part = Part.whole(row.shape) if parts is None else parts[row.name]
        _fill(local(tensors[row.name]), row, part, seed, model.config.initializer_range)


def _fill(tensor: torch.Tensor, row: Parameter, part: Part, seed: int, deviation: float) -> None:
    if row.initialisation != "normal":
        tensor.fill_(1.0 if row.initialisation == "ones" else 0.0)
        return
    digest = hashlib.sha256(f"{seed}/{row.name}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if len(row.shape) == 2:
        tensor.copy_(torch.randn(row.shape, generator=stream).mul_(deviation)[part.block])
        return
    # One expert at a time: a layer's experts together can be larger than memory.
    mine, *block = part.block
    for expert in range(min(mine.stop, row.shape[0])):
        drawn = torch.randn(row.shape[1:], generator=stream)
        if expert >= mine.start:
            tensor[expert - mine.start].copy_(drawn.mul_(deviation)[tuple(block)])

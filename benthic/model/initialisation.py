"""First values of a model's parameters, from the manifest."""

from __future__ import annotations

import hashlib

import torch

from benthic.config.manifest import Parameter, parameters
from benthic.model.language_model import LanguageModel


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill every tensor: normal with config.initializer_range, ones or zeros, as the manifest says.

    Each tensor draws from a stream of its own, named by `seed` and its name, on the processor: the same values on
    every device, and for every model that has a tensor of that name and shape.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for row in parameters(model.config):
        _fill(tensors[row.name], row, seed, model.config.initializer_range)


def _fill(tensor: torch.Tensor, row: Parameter, seed: int, deviation: float) -> None:
    if row.initialisation == "normal":
        digest = hashlib.sha256(f"{seed}/{row.name}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # One expert at a time: a layer's experts together can be larger than memory.
        for part in tensor if tensor.ndim == 3 else (tensor,):
            part.copy_(torch.randn(part.shape, generator=stream).mul_(deviation))
    else:
        tensor.fill_(1.0 if row.initialisation == "ones" else 0.0)

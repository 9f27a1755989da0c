"""How much a rank sends in an update: rows to experts and back, gradients and weights between copies. Counted on what
the trainer has, the router's rule and a rank's blocks; the planner counts from formulas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from benthic.config.train import TrainConfig
from benthic.errors import NumericsError
from benthic.ops.route import route
from benthic.parallel.experts import without_repeats
from benthic.plan.communication import exchange_rows
from benthic.train.distributed import compute_dtype


@dataclass(frozen=True, slots=True)
class Exchange:
    """One micro-batch in one expert layer, of one group of expert ranks: rows that a rank sends to others on average,
    the most rows that one gets, and the bytes of a row by what is sent."""

    sent: float
    most_received: int
    row_bytes: dict[str, float]

    @property
    def bytes(self) -> float:
        """A rank sends so much for a layer and a micro-batch, forward and backward."""
        return self.sent * sum(self.row_bytes.values())


@torch.no_grad()
def exchange(config: TrainConfig) -> Exchange:
    """Dispatch a micro-batch of every rank of one group, routed by the model's rule from random scores. Raises
    NumericsError where what one rank sends another is not what that one gets."""
    model, ranks = config.model, config.parallel.expert
    shared = config.parallel.context * config.parallel.tensor
    tokens = config.batch.micro_sequences * config.data.sequence_length // shared
    stream = torch.Generator().manual_seed(config.seed)
    bias = torch.zeros(model.n_routed_experts) if model.has_routing_bias else None
    held = model.n_routed_experts // ranks
    sent = torch.zeros(ranks, ranks, dtype=torch.int64)
    received = torch.zeros(ranks, ranks, dtype=torch.int64)
    for rank in range(ranks):
        chosen = route(torch.randn(tokens, model.n_routed_experts, generator=stream), bias, model).experts
        holders = chosen // held
        towards = without_repeats(holders)
        sent[rank] = towards[towards >= 0].bincount(minlength=ranks)
        # What each rank gets: the tokens that chose any of its experts.
        received[:, rank] = torch.zeros(tokens, ranks, dtype=torch.bool).scatter_(1, holders, True).sum(0)
    if not torch.equal(sent, received.t()):
        source, target = (sent != received.t()).nonzero()[0].tolist()
        raise NumericsError(
            f"in an exchange of tokens rank {source} sends rank {target} {sent[source, target]:,} rows, of "
            f"{received[target, source]:,} tokens that chose experts there"
        )
    away = float(sent.sum() - sent.diagonal().sum()) / ranks
    rows = exchange_rows(model, narrow=config.precision.compute == "float8")
    if compute_dtype(config) == torch.float32:
        width = 2 * model.hidden_size
        rows = {what: size + width for what, size in rows.items()}
    return Exchange(away, int(received.sum(1).max()), rows)


@dataclass(frozen=True, slots=True)
class Synchronisation:
    """Bytes that a rank sends in an update for gradients and for weights, of layers and all else, and of experts."""

    gradients: float
    weights: float


def synchronisation(parameters: Iterable[nn.Parameter], config: TrainConfig, micro_batches: int) -> Synchronisation:
    """Of a rank's parameters as FSDP has cut them: float32 gradients reduced and scattered over shards, then summed
    over replicas, and weights gathered in the compute type. Blocks are filled up to be alike on all ranks."""
    layout = config.parallel
    # A pipeline gathers once an update; otherwise weights go after each backward, under ZeRO 3 after forward too.
    scatters = 1 if layout.zero < 2 else micro_batches
    gathers = 1 if layout.pipeline > 1 else micro_batches * (2 if layout.zero == 3 else 1)
    gradients = weights = 0.0
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        shards, replicas = mesh.size(mesh.ndim - 1), mesh.size() // mesh.size(mesh.ndim - 1)
        placement = parameter.placements[-1]
        length = parameter.shape[placement.dim] if isinstance(placement, Shard) else 1
        whole = parameter.numel() * (-(-length // shards) * shards) / length
        piece = whole / shards
        gradients += 4 * (scatters * (whole - piece) + scatters * 2 * piece * (replicas - 1) / replicas)
        weights += gathers * compute_dtype(config).itemsize * (whole - piece)
    return Synchronisation(gradients, weights)

"""Losses that even out what experts and groups of them get: of single experts (DeepSeek-V3's over a sequence and
DeepSeek-V2's), and of V2's devices (arXiv:2405.04434, section 2.2.3).

Each is a sum of a count, which has no gradient, times a mean of scores. Where ranks have parts of the same sequences,
counts are summed over them first; then the losses of the parts add up to that of the whole, and so do gradients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benthic.config.model import ModelConfig
from benthic.config.train import BalanceConfig
from benthic.data import Batch
from benthic.model.language_model import States
from benthic.ops import Routing
from benthic.parallel.sequence import Whole
from benthic.parallel.world import World


def balance_loss(
    states: States, batch: Batch, of_update: int, config: BalanceConfig, model: ModelConfig, world: World
) -> Tensor:
    """The part of an update of `of_update` sequences that `batch` has in the balance losses of all layers, weighed."""
    kind, (sequences, tokens) = config.auxiliary_loss, batch.tokens.shape
    layers, total = list(states.routing.values()), states.hidden.new_zeros((), dtype=torch.float32)
    wholes: list[Whole | None] = [None] * len(layers)
    if world.shares_sequences:
        ahead = [max(0, layer - model.num_hidden_layers + 1) for layer in states.routing]
        wholes = [Whole(tokens - 1 - depth, world.add_up_sequences) for depth in ahead]
    pairs = list(zip(layers, wholes, strict=True))
    if layers and kind != "none" and config.alpha:
        each = torch.stack([auxiliary_loss(kind, routing, sequences, whole) for routing, whole in pairs])
        total = total + config.alpha * sequences / of_update * each.sum()
    if layers and (config.device_alpha or config.communication_alpha):
        groups = model.n_group, model.topk_group
        each = [torch.stack(group_losses(routing, sequences, *groups, whole)) for routing, whole in pairs]
        both = torch.stack(each).sum(0)
        weighed = config.device_alpha * both[0] + config.communication_alpha * both[1]
        total = total + sequences / of_update * weighed
    return total


def auxiliary_loss(
    kind: Literal["sequence", "expert", "batch"], routing: Routing, num_sequences: int, whole: Whole | None = None
) -> Tensor:
    """sum_i f_i P_i of one layer, a mean over sequences, before its weight alpha.

    P_i is the mean of expert i's scores after dividing each token's by their sum. f_i is E/(K T) times the number of
    tokens whose K best scores, bias and groups aside, contain i ("sequence", DeepSeek-V3 equations 17 to 20), or that
    were sent to i ("expert", DeepSeek-V2 equations 23 to 25; "batch" takes all T tokens together). It is 1 when the
    load is even. Gradient flows through P alone. `whole` tells
    of all the sequence where the routing is of a part.
    """
    num_experts, num_chosen = routing.scores.shape[-1], routing.experts.shape[-1]
    rows = 1 if kind == "batch" else num_sequences
    best = routing.scores.topk(num_chosen, dim=-1).indices if kind == "sequence" else routing.experts
    best = best.reshape(rows, -1)  # [B, S * K]
    counts = torch.zeros(rows, num_experts, device=best.device)
    counts.scatter_add_(1, best, torch.ones_like(best, dtype=counts.dtype))  # [B, E]
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    probability = share.reshape(rows, -1, num_experts).mean(1)  # [B, E]
    if whole is None:
        frequency = counts * (num_experts / best.shape[1])
        return (frequency * probability).sum(-1).mean()
    choices = num_chosen * whole.length * num_sequences // rows
    frequency = whole.add_up(counts) * (num_experts / choices)
    return (frequency * probability).sum(-1).mean() * (best.shape[1] / choices)


def group_losses(
    routing: Routing, num_sequences: int, groups: int, kept: int, whole: Whole | None = None
) -> tuple[Tensor, Tensor]:
    """The losses of one layer (equations 26 to 31), means over sequences, before
    their weights: of what each of `groups` equal groups of experts computes, and of how many tokens each is sent.

    Both are sum_i f_i P_i over groups, P_i being the sum of the group's P of `auxiliary_loss`. f_i is the mean of the
    group's f ("expert") for the first, and for the second groups/(kept T) times the number of tokens with any choice
    in the group, `kept` being how many groups a token may reach. Both are 1 when the load is even. `whole` as for
    `auxiliary_loss`.
    """
    num_experts, num_chosen = routing.scores.shape[-1], routing.experts.shape[-1]
    chosen = (routing.experts // (num_experts // groups)).view(num_sequences, -1, num_chosen)  # [B, S, K]
    length = chosen.shape[1]
    choices = torch.zeros(num_sequences, length, groups, device=chosen.device)
    choices.scatter_add_(2, chosen, torch.ones_like(chosen, dtype=choices.dtype))  # [B, S, G]
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    probability = share.view(num_sequences, length, groups, -1).sum(-1).mean(1)  # [B, G]
    computed, sent = choices.mean(1), (choices > 0).float().mean(1)
    if whole is not None:
        part = length / whole.length
        computed, sent = whole.add_up(torch.stack((computed, sent)).mul_(part))
        probability = probability * part
    computed, sent = computed * (groups / num_chosen), sent * (groups / kept)
    return (computed * probability).sum(-1).mean(), (sent * probability).sum(-1).mean()

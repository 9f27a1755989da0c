"""Keeping experts evenly loaded: the routing bias (loss-free, arXiv:2408.15664) and the auxiliary losses.

Loss-free balancing moves a bias b_i that selection alone sees, after each update, by the sign of the error:
b_i += speed * sign(mean load - load_i), the loads being those of the whole update. A load is a count of T*K/E tokens
on average, so sampling alone moves it by a share sigma = sqrt(E / (T K)) of itself, and a sign reads that noise as an
error. Below the noise the rule acts as a proportional one with gain speed/sigma, driven by steps of size speed: its
loads jitter by sqrt(speed * sigma) up to a constant. Keeping that jitter means speed in proportion to sqrt(T), which
is `scaled_speed`. The reference of 51,200 tokens gives 1e-4 at 512 tokens an update, where 1e-4 was found stable
and 1e-3 to collapse; at the millions of tokens of the papers the speed is theirs, unscaled.

Loads are counted from what a forward pass returns, so recomputation in the backward pass cannot count them twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from benthic.config.model import ModelConfig
from benthic.config.train import BalanceConfig
from benthic.ops import Routing


def count_loads(experts: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert: `experts` int64 [T, K] to int64 [E]."""
    chosen = experts.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=experts.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )


def of_all_layers(loads: Mapping[int, Tensor], model: ModelConfig, device: torch.device) -> dict[int, Tensor]:
    """Loads int64 [E] of every layer with experts, prediction layers included: zeros for those not in `loads`, which
    other stages of a pipeline have counted."""
    if not model.n_routed_experts:
        return {}
    layers = range(model.num_hidden_layers + model.num_nextn_predict_layers)
    none = torch.zeros(model.n_routed_experts, dtype=torch.int64, device=device)
    return {layer: loads.get(layer, none.clone()) for layer in layers if model.is_expert_layer(layer)}


def max_violation(loads: Tensor) -> Tensor:
    """MaxVio of each layer: max load / mean load - 1, `loads` [L, E] to float32 [L] (arXiv:2408.15664, eq. 4)."""
    loads = loads.float()
    return loads.amax(-1) / loads.mean(-1).clamp_min(1e-9) - 1


def scaled_speed(speed: float, tokens: int, reference_tokens: int) -> float:
    """`speed` for an update of `tokens` tokens: shrunk by sqrt(tokens / reference) below the reference."""
    return speed * min(1.0, tokens / reference_tokens) ** 0.5


@torch.no_grad()
def move_biases(biases: Mapping[int, Tensor], loads: Mapping[int, Tensor], config: BalanceConfig, speed: float) -> None:
    """One update of every layer's bias, in place: overloaded experts down, underloaded ones up, by `speed`."""
    if config.bias_rule == "none" or not speed or not biases:
        return
    # All layers together: a handful of small operations, not as many a layer.
    load = torch.stack([loads[layer] for layer in biases]).float()  # [L, E]
    direction = (load.mean(-1, keepdim=True) - load).sign()
    if config.bias_rule == "centred_sign":
        direction -= direction.mean(-1, keepdim=True)
    moved = list(biases.values())
    torch._foreach_add_(moved, list(direction.to(moved[0].device).unbind()), alpha=speed)


def group_losses(routing: Routing, num_sequences: int, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's balance losses between devices (equations 26 to 31) of one layer, means over sequences, before
    their weights: of what each of `groups` equal groups of experts computes, and of how many tokens each is sent.

    Both are sum_i f_i P_i over groups, P_i being the sum of the group's P of `auxiliary_loss`. f_i is the mean of the
    group's f ("expert") for the first, and for the second groups/(kept T) times the number of tokens with any choice
    in the group, `kept` being how many groups a token may reach. Both are 1 when the load is even.
    """
    num_experts, num_chosen = routing.scores.shape[-1], routing.experts.shape[-1]
    chosen = (routing.experts // (num_experts // groups)).view(num_sequences, -1, num_chosen)  # [B, S, K]
    length = chosen.shape[1]
    choices = torch.zeros(num_sequences, length, groups, device=chosen.device)
    choices.scatter_add_(2, chosen, torch.ones_like(chosen, dtype=choices.dtype))  # [B, S, G]
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    probability = share.view(num_sequences, length, groups, -1).sum(-1).mean(1)  # [B, G]
    computed = choices.mean(1) * (groups / num_chosen)
    sent = (choices > 0).float().mean(1) * (groups / kept)
    return (computed * probability).sum(-1).mean(), (sent * probability).sum(-1).mean()


def auxiliary_loss(kind: Literal["sequence", "expert", "batch"], routing: Routing, num_sequences: int) -> Tensor:
    """sum_i f_i P_i of one layer, a mean over sequences, before its weight alpha.

    P_i is the mean of expert i's scores after dividing each token's by their sum. f_i is E/(K T) times the number of
    tokens whose K best scores, bias and groups aside, contain i ("sequence", DeepSeek-V3 equations 17 to 20), or that
    were sent to i ("expert", DeepSeek-V2 equations 23 to 25; "batch" takes all T tokens together). It is 1 when the
    load is even. Gradient flows through P alone.
    """
    num_experts, num_chosen = routing.scores.shape[-1], routing.experts.shape[-1]
    rows = 1 if kind == "batch" else num_sequences
    best = routing.scores.topk(num_chosen, dim=-1).indices if kind == "sequence" else routing.experts
    best = best.reshape(rows, -1)  # [B, S * K]
    counts = torch.zeros(rows, num_experts, device=best.device)
    counts.scatter_add_(1, best, torch.ones_like(best, dtype=counts.dtype))  # [B, E]
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    probability = share.reshape(rows, -1, num_experts).mean(1)  # [B, E]
    frequency = counts * (num_experts / best.shape[1])
    return (frequency * probability).sum(-1).mean()

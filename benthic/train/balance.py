"""Keeping experts evenly loaded by the routing bias (loss-free, arXiv:2408.15664).

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

import torch
from torch import Tensor

from benthic.config.model import ModelConfig
from benthic.config.train import BalanceConfig


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

"""DeepSeek-V2's balance losses between devices (arXiv:2405.04434, section 2.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.ops import Routing
from benthic.parallel.sequence import Whole


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

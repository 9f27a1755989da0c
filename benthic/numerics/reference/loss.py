"""Cross entropy from whole logits, and the training loss with prediction layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int64[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], int]:
    """Summed -log softmax(logits)[target] and the number of targets that count (not -100)."""
    counted = (targets != -100).nonzero().flatten()
    logits, targets = logits[counted], targets[counted]
    chosen = logits[torch.arange(len(targets)), targets]
    return (logits.logsumexp(-1) - chosen).sum(), len(counted)


def prediction_loss(
    prediction_logits: list[Float[Tensor, "batch _positions vocabulary"]],
    input_ids: Int64[Tensor, "batch positions"],
    labels: Int64[Tensor, "batch positions"],
) -> list[Float[Tensor, ""]]:
    """L_k of DeepSeek-V3, section 2.2: depth k's row i is judged by token i + k + 1, divided by all B S positions.

    `prediction_logits[k - 1]` is [B, S - k, V]; `labels` are `input_ids` moved on by one.
    """
    losses = []
    for depth, logits in enumerate(prediction_logits, 1):
        judged = [
            cross_entropy(logits[row, place][None], labels[row, place + depth][None])[0]
            for row in range(len(input_ids))
            for place in range(logits.shape[1])
        ]
        losses.append(torch.stack(judged).sum() / input_ids.numel())
    return losses

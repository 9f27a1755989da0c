"""Embedding, head and loss where each rank holds V / ranks consecutive words.

No rank ever has the logits of another's words: a row needs of them only the logarithm of their summed exponentials,
one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benthic.ops.linear_cross_entropy import IGNORED
from benthic.parallel.collectives import gather, gathered, reduced

_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 29}
"""Logits in a block, which are float32 here: 2 GiB on a GPU."""


class VocabularyEmbedding(nn.Module):
    """Rows by token id; `weight` [V / ranks, D] holds this rank's words. What comes out is the rank's piece of the
    positions in training, and all positions without gradients."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self._group = weight, group

    def forward(self, ids: Int64[Tensor, "batch positions"]) -> Float[Tensor, "batch _positions width"]:
        own, inside = _own(ids, len(self.weight), self._group)
        rows = F.embedding(own, self.weight).masked_fill(~inside[..., None], 0)
        if torch.is_grad_enabled():
            return reduced(rows, self._group, 1)
        dist.all_reduce(rows, group=self._group)
        return rows


def all_words(head: Callable[[Tensor], Tensor], group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """`head`, which gives logits of this rank's words, made to give those of all; for validation and samples."""

    def logits(hidden: Tensor) -> Tensor:
        return gathered(head(hidden), group, -1)

    return logits


def shared_cross_entropy(
    hidden: Float[Tensor, "batch positions width"],
    weight: Float[Tensor, "words width"],
    targets: Int64[Tensor, "batch all_positions"],
    divisor: float | int,
    group: dist.ProcessGroup,
) -> Float32[Tensor, ""]:
    """This rank's part of `linear_cross_entropy`: the loss of those targets that are its own words. Parts add up over
    ranks; gradients are those of the whole. `hidden` is the rank's piece of the positions, `targets` are of all."""
    rows = gathered(hidden, group, 1).flatten(0, 1)
    return _SharedCrossEntropy.apply(rows, weight, targets.flatten(), divisor, group)


def _own(ids: Tensor, words: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Numbers of words counted from this rank's first, and which of them are its own; others are given some number."""
    own = ids - group.rank() * words
    return own.clamp(0, words - 1), (own >= 0) & (own < words)


class _SharedCrossEntropy(torch.autograd.Function):
    """A block of rows at a time, as in ops/linear_cross_entropy.py; gradients exist once the loss does."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float | int, group: dist.ProcessGroup
    ) -> Tensor:
        words = len(weight)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        size = max(1, _BLOCK_ELEMENTS[hidden.device.type] // words)
        for start in range(0, len(hidden), size):
            rows, wanted = hidden[start : start + size], targets[start : start + size, None]
            own, inside = _own(wanted, words, group)
            logits = torch.mm(rows, weight.t()).float()  # [rows, words]
            log_sum = gather(logits.logsumexp(-1)[None], group, 0).logsumexp(0)[:, None]  # [rows, 1]
            loss += ((log_sum - logits.gather(1, own)) * inside).sum()
            grad = logits.sub_(log_sum).exp_().scatter_add_(1, own, -inside.float())
            grad = grad.mul_((wanted != IGNORED) / divisor).type_as(hidden)
            torch.mm(grad, weight, out=grad_hidden[start : start + size])
            grad_weight += torch.mm(grad.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_weight.type_as(weight))
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return *((saved * grad.reshape(1)).type_as(saved) for saved in ctx.saved_tensors), None, None, None

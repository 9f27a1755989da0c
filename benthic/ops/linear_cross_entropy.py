"""Cross entropy of a linear head, without ever holding the logits. Reference: numerics/reference/loss.py.

The logits of a batch are the largest array of training by far ([T, V] against [T, D]). They are computed for a few
rows at a time, and since softmax minus one-hot is already the gradient, each block also yields its share of the
gradients before it is dropped: three products in all, as without chunks, and none repeated in backward.

On a GPU a block is as large as a GPU can bear: small ones read and write the weight's gradient, as large as the weight,
again and again. One kernel turns its logits into their gradient where they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""A target that counts for nothing (torch's default)."""

_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 31}
"""Logits in a block: what a processor's cache holds; 4 GiB of bfloat16 on a GPU."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int64[Tensor, " tokens"],
    divisor: float | int = 1,
) -> tuple[Float32[Tensor, ""], Int64[Tensor, ""]]:
    """Summed -log softmax(hidden @ weight.T)[target] / divisor, and how many targets counted; one of -100 is left out.

    Both stay on the device: nothing here waits for a GPU. There the gradients exist once the loss does, divided
    already, so that backward passes them on and makes no pass over them unless the loss is multiplied again.
    """
    if hidden.device.type == "cuda":
        loss = _InPlace.apply(hidden, weight, targets, divisor)
    else:
        loss = _LinearCrossEntropy.apply(hidden, weight, targets) / divisor
    return loss, (targets != IGNORED).sum()


class _InPlace(torch.autograd.Function):
    """The path of a GPU. A second backward through one loss is an error: the gradients were given away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: float | int) -> Tensor:
        from benthic.kernels.cross_entropy import cross_entropy_

        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        blocks = max(1, -(-len(hidden) * len(weight) // _BLOCK_ELEMENTS["cuda"]))
        size = max(1, -(-len(hidden) // blocks))
        for start in range(0, len(hidden), size):
            rows = hidden[start : start + size]
            logits = torch.mm(rows, weight.t())  # [rows, V]
            wanted = targets[start : start + size].contiguous()
            loss += cross_entropy_(logits, wanted, 1 / divisor, needs_hidden or needs_weight).sum()
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + size])
            if needs_weight and size >= len(hidden):
                grad_weight = torch.mm(logits.t(), rows)
            elif needs_weight:
                product = _float32_product(logits.t(), rows)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
                del product
            del logits  # before the next block's are allocated
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.type_as(weight)
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        from benthic.kernels.cross_entropy import multiply_

        # Kept outside save_for_backward, which would hold them too: autograd adopts what nobody else holds, and
        # copies the rest.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were used already; compute the loss again")
        for gradient in gradients:
            if gradient is not None:
                multiply_(gradient, grad_outputs[0])
        return *gradients, None, None


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if right.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        size = max(1, _BLOCK_ELEMENTS.get(hidden.device.type, 1 << 27) // len(weight))
        for start in range(0, len(hidden), size):
            rows = hidden[start : start + size]
            counts = targets[start : start + size, None] != IGNORED  # [rows, 1]
            target = targets[start : start + size, None].clamp(min=0)
            logits = torch.mm(rows, weight.t())  # [rows, V]
            grad = F.softmax(logits, -1, dtype=torch.float32)
            # The likeliest class has at least probability 1 / V, so its logarithm is exact where others underflow.
            log_sum = logits.amax(-1, keepdim=True) - grad.amax(-1, keepdim=True).log()
            loss += ((log_sum - logits.gather(1, target)) * counts).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = grad.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)).type_as(hidden)
            # Ignored rows are cleared where they are D wide and not V.
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + size]).mul_(counts)
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), rows * counts)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.type_as(weight))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        return *(None if saved is None else _scaled(saved, grad) for saved in ctx.saved_tensors), None


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """saved * factor in saved's dtype, multiplied in float32: a factor 1 / tokens rounded to bfloat16 would make every
    gradient wrong by the same third of a percent, and each of several losses by another."""
    # One dimension instead of none, or the factor would be cast to saved's dtype before the product.
    return torch.mul(saved, factor.reshape(1), out=torch.empty_like(saved))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in float32."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right

"""The ends of a training step: the head with its loss, forwards and backwards, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forward_backward import Runs, error, exact
from benchmarks.kernel_case import Case
from benthic import ops
from benthic.kernels.cross_entropy import cross_entropy_
from benthic.numerics.reference import adamw as reference
from benthic.numerics.reference.adamw import Rule
from benthic.ops.adamw import adamw, gradient_norms

TOLERANCE = 2e-2
RULE = Rule(learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, updates=1)
CLIP = 1.0
JUDGED = 1 << 22
"""Elements of a parameter that are compared with the reference."""


def cases(device: str) -> Iterator[Case]:
    """Heads of V3 and of the bench model; the optimiser on the bench model's largest parameter."""
    for tokens, width, vocabulary in ((8192, 7168, 129280), (16384, 2048, 102400)):
        yield _head(tokens, width, vocabulary, device)
    shape = (64, 2816, 2048)
    for rows, columns in ((8192, 102400), (8192, 129280)):
        yield _loss(rows, columns, device)
    yield _norm(device)
    for moments, size in ((torch.bfloat16, 20), (torch.float32, 28)):
        yield _adamw(shape, moments, size, device)


def _head(tokens: int, width: int, vocabulary: int, device: str) -> Case:
    """Loss and both gradients. "its products" are three matrix products and nothing else: the least there can be."""
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)

    def mean(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    expected = exact(lambda *inputs: (mean(*inputs),), [hidden, weight], [torch.ones((), device=device)])
    compiled = torch.compile(mean)
    losses: Runs = {
        "benthic": lambda: ops.linear_cross_entropy(hidden, weight, targets, tokens)[0],
        "torch.compile": lambda: compiled(hidden, weight),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch"] = lambda: F.linear_cross_entropy(hidden, weight, targets)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        pass
    else:
        liger = LigerFusedLinearCrossEntropyLoss()
        losses["liger-kernel"] = lambda: liger(weight, hidden, targets)
    runs: Runs = {name: _with_gradients(loss, [hidden, weight]) for name, loss in losses.items()}
    logits = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16)
    plain_hidden, plain_weight = hidden.detach(), weight.detach()

    def products() -> None:
        torch.mm(plain_hidden, plain_weight.t(), out=logits)
        torch.mm(logits, plain_weight)
        torch.mm(logits.t(), plain_hidden)

    judge = error(expected)
    return Case(
        "linear_cross_entropy with gradients", f"{tokens}x{width}x{vocabulary}", runs | {"its products": products},
        lambda found: 0.0 if found is None else judge(found), TOLERANCE,
        2 * 2 * width * (tokens + vocabulary), 3 * 2 * tokens * width * vocabulary,
    )  # fmt: skip


def _with_gradients(loss: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        found = loss()
        return found, *torch.autograd.grad(found, leaves)

    return run


def _loss(rows: int, columns: int, device: str) -> Case:
    """Cross entropy in the logits' place. A run's logits are what its run before has left: only its first is judged."""
    start = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, columns, (rows,), device=device)
    judged = F.cross_entropy(start[:512].float(), targets[:512], reduction="none")
    logits = start.clone()

    def judge(found: Tensor) -> float:
        logits.copy_(start)
        return float((found[:512] - judged).norm() / judged.norm())

    runs: Runs = {"benthic": lambda: cross_entropy_(logits, targets, 1.0 / rows)}
    return Case("cross entropy in place", f"{rows}x{columns}", runs, judge, 1e-3, 4 * start.numel())


def _norm(device: str) -> Case:
    """Of gradients as a model has them: few large, many small."""
    shapes = [(64, 2816, 2048), (64, 2048, 1408), *[(2048, 2048)] * 20, *[(2048,)] * 20]
    gradients = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    expected = float(sum(one.double().square().sum() for one in gradients)) ** 0.5

    def foreach() -> Tensor:
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))

    runs: Runs = {"benthic": lambda: gradient_norms(gradients), "torch foreach": foreach}
    elements = sum(one.numel() for one in gradients)
    return Case(
        "gradient norms", f"{len(shapes)} tensors, {elements >> 20} Mi", runs,
        lambda found: abs(float(found.norm()) - expected) / expected, 1e-4, 2 * elements,
    )  # fmt: skip


def _adamw(shape: tuple[int, ...], moments: torch.dtype, size: int, device: str) -> Case:
    """One update with its clipping, from a bfloat16 gradient to a bfloat16 parameter; torch's has float32 gradients,
    as AdamW asks of them, and float32 moments."""
    start = torch.randn(shape, device=device)
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
    # An update changes what it works on, so each run has its own; it is compared after its first.
    states: dict[str, Any] = {}
    finite = torch.ones((), dtype=torch.bool, device=device)
    (norm,) = gradient_norms([gradient])

    def benthic() -> Tensor:
        if "benthic" not in states:
            zeros = torch.zeros(shape, dtype=moments, device=device)
            states["benthic"] = start.clone(), zeros, zeros.clone(), start.bfloat16()
        master, first, second, parameter = states["benthic"]
        clip = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        adamw(master, gradient, first, second, parameter, RULE, clip, finite)
        return master

    def torch_fused() -> Tensor:
        if "torch" not in states:
            master = start.clone().requires_grad_()
            master.grad = gradient.float()
            rule = {"lr": RULE.learning_rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            states["torch"] = master, torch.optim.AdamW([master], fused=True, **rule), start.bfloat16()
        master, optimizer, parameter = states["torch"]
        torch.nn.utils.clip_grads_with_norm_([master], CLIP, norm)
        optimizer.step()
        parameter.copy_(master.detach())
        return master.detach()

    expected = start.flatten()[:JUDGED].clone()
    zeros = torch.zeros_like(expected)
    clip = (CLIP / (norm + 1e-6)).clamp(max=1.0)
    reference.adamw(expected, gradient.flatten()[:JUDGED], zeros, zeros.clone(), None, RULE, clip, finite)
    change = (expected - start.flatten()[:JUDGED]).norm()

    def check(found: Tensor) -> float:
        return float((found.flatten()[:JUDGED] - expected).norm() / change)

    name = str(moments).removeprefix("torch.")
    runs: Runs = {"benthic": benthic, "torch fused, float32": torch_fused}
    return Case(f"adamw, {name} moments", "x".join(map(str, shape)), runs, check, 1e-3, size * start.numel())

"""RMSNorm, alone and after the addition to the residual stream, at V3's width and at that of its latents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forward_backward import Runs, backward, error, exact
from benchmarks.kernel_case import Case
from benthic import ops
from benthic.numerics.reference import norm as reference

EPS = 1e-6
TOLERANCE = 1e-2


def cases(device: str) -> Iterator[Case]:
    """Forward and backward, bfloat16: V3's stream, the bench model's, and its latents inside rows of 576."""
    for tokens, width, row in ((32768, 7168, 7168), (16384, 2048, 2048), (16384, 512, 576)):
        yield from _norm(tokens, width, row, device)
    for tokens, width in ((32768, 7168), (16384, 2048)):
        yield from _norm_of_sum(tokens, width, device)


def _norm(tokens: int, width: int, row: int, device: str) -> Iterator[Case]:
    x = torch.randn(tokens, row, device=device, dtype=torch.bfloat16)[:, :width].requires_grad_()
    weight = (1 + torch.randn(width, device=device, dtype=torch.bfloat16) / 4).requires_grad_()
    grad = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    functions = {"benthic": lambda: ops.rms_norm(x, weight, EPS)} | _peers(x, weight)
    shape, size = f"{tokens}x{width}" + (f" of {row}" if row > width else ""), 2 * tokens * width
    expected = exact(lambda x, w: (reference.rms_norm(x, w, EPS),), [x, weight], [grad])
    yield Case("rms_norm", shape, functions, error(expected[:1]), TOLERANCE, 2 * size)
    runs = backward(functions, [x, weight], [grad])
    yield Case("rms_norm backward", shape, runs, error(expected[1:]), TOLERANCE, 3 * size)


def _norm_of_sum(tokens: int, width: int, device: str) -> Iterator[Case]:
    residual, x, *grads = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(4))
    residual, x = residual.requires_grad_(), x.requires_grad_()
    weight = (1 + torch.randn(width, device=device, dtype=torch.bfloat16) / 4).requires_grad_()
    functions: Runs = {"benthic": lambda: ops.add_rms_norm(residual, x, weight, EPS)}

    def composed(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, F.rms_norm(total, weight.shape, weight, EPS)

    compiled = torch.compile(composed)
    functions["torch"] = lambda: composed(residual, x, weight)
    functions["torch.compile"] = lambda: compiled(residual, x, weight)
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as liger
    except ImportError:
        pass
    else:  # it gives the norm first
        functions["liger-kernel"] = lambda: liger.apply(x, residual, weight, EPS, 0.0, "llama", False)[::-1]
    shape, size = f"{tokens}x{width}", 2 * tokens * width
    expected = exact(lambda r, x, w: reference.add_rms_norm(r, x, w, EPS), [residual, x, weight], grads)
    yield Case("add_rms_norm", shape, functions, error(expected[:2]), TOLERANCE, 4 * size)
    runs = backward(functions, [residual, x, weight], grads)
    yield Case("add_rms_norm backward", shape, runs, error(expected[2:]), TOLERANCE, 4 * size)


def _peers(x: Tensor, weight: Tensor) -> Runs:
    compiled = torch.compile(F.rms_norm)
    peers: Runs = {
        "torch": lambda: F.rms_norm(x, weight.shape, weight, EPS),
        "torch.compile": lambda: compiled(x, weight.shape, weight, EPS),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as liger
    except ImportError:
        return peers
    return peers | {"liger-kernel": lambda: liger.apply(x, weight, EPS, 0.0, "llama", False)}

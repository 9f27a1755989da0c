"""Latent attention's heads, rotary embedding, and softmax attention at 192 / 128: V3's heads and the bench model's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.forward_backward import Runs, backward, error, exact
from benchmarks.kernel_case import Case
from benthic import ops
from benthic.numerics.reference import latent_heads as reference
from benthic.numerics.reference import rotary as reference_rotary

SHAPES = ((1, 4096, 128), (4, 4096, 16))
"""Sequences, positions, heads: V3's, and the bench model's."""
N, R, V, LATENT = 128, 64, 128, 512
TOLERANCE = 1e-2


def cases(device: str) -> Iterator[Case]:
    """bfloat16, forward and backward."""
    for shape in SHAPES:
        yield from _heads(*shape, device)
    yield from _rotary(4, 4096, 32, 8, 128, device)
    for shape in SHAPES:
        yield from _attention(*shape, device)


def _heads(batch: int, positions: int, heads: int, device: str) -> Iterator[Case]:
    random = {"device": device, "dtype": torch.bfloat16}
    query = torch.randn(batch, positions, heads, N + R, **random).requires_grad_()
    expanded = torch.randn(batch, positions, heads, N + V, **random).requires_grad_()
    rotary_key = torch.randn(batch, positions, LATENT + R, **random)[..., LATENT:].requires_grad_()
    grads = [torch.randn(batch, positions, heads, width, **random) for width in (N + R, N + R, V)]
    table, inputs = _rotations(positions, R, device), [query, expanded, rotary_key]
    compiled = torch.compile(_composed_heads)
    functions: Runs = {
        "benthic": lambda: ops.latent_heads(*inputs, table, True),
        "torch": lambda: _composed_heads(*inputs, table.real, table.imag),
        "torch.compile": lambda: compiled(*inputs, table.real, table.imag),
    }
    shape, pairs = f"{batch}x{positions} tokens, {heads} heads", batch * positions * heads
    keys = 2 * batch * positions * R
    expected = exact(lambda *x: reference.latent_heads(*x, table, True), inputs, grads)
    yield Case("latent_heads", shape, functions, error(expected[:3]), TOLERANCE, 2 * pairs * (3 * (N + R) + N) + keys)
    runs = backward(functions, inputs, grads)
    moved = 2 * pairs * (3 * (N + R) + V + N + V) + keys
    yield Case("latent_heads backward", shape, runs, error(expected[3:]), TOLERANCE, moved)


def _composed_heads(
    query: Tensor, expanded: Tensor, rotary_key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """The same out of torch's operations."""
    turned = _turned(query[..., N:], cos, sin)
    shared = _turned(rotary_key[:, :, None], cos, sin).expand(-1, -1, query.shape[2], -1)
    key, value = expanded.split_with_sizes((N, V), -1)
    return torch.cat((query[..., :N], turned), -1), torch.cat((key, shared), -1), value


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference_rotary.rotary(x.float(), cos, sin, True).to(x.dtype)


def _rotary(batch: int, positions: int, heads: int, key_heads: int, width: int, device: str) -> Iterator[Case]:
    random = {"device": device, "dtype": torch.bfloat16}
    query, key = (torch.randn(batch, positions, h, width, **random) for h in (heads, key_heads))
    table = _rotations(positions, width, device)
    runs: Runs = {"benthic": lambda: (ops.rotary(query, table, False), ops.rotary(key, table, False))}

    def composed(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        both = (reference_rotary.rotary(x.float(), cos, sin, False) for x in (query, key))
        return tuple(x.bfloat16() for x in both)

    compiled = torch.compile(composed)
    runs["torch"] = lambda: composed(query, key, table.real, table.imag)
    runs["torch.compile"] = lambda: compiled(query, key, table.real, table.imag)
    try:
        from liger_kernel.ops.rope import LigerRopeFunction as liger
    except ImportError:
        pass
    else:  # it turns in place, so it has copies of its own, and the first call is the one that is checked
        own = [x.clone().transpose(1, 2) for x in (query, key)]
        cos, sin = (torch.cat((x, x), -1)[None].bfloat16() for x in (table.real, table.imag))
        runs["liger-kernel (in place)"] = lambda: tuple(x.transpose(1, 2) for x in liger.apply(*own, cos, sin))
    expected = composed(query, key, table.real, table.imag)
    size = 4 * batch * positions * (heads + key_heads) * width
    yield Case("rotary", f"{batch}x{positions}x({heads} + {key_heads})x{width}", runs, error(expected), TOLERANCE, size)


def _attention(batch: int, positions: int, heads: int, device: str) -> Iterator[Case]:
    """FLOPs: two matmuls of 192 and 128 channels forward; backward three of 192 and two of 128, scores included, which
    is 2.6 times the forward's (2.5 where both widths are equal)."""
    random, scale = {"device": device, "dtype": torch.bfloat16}, (N + R) ** -0.5
    query, key = (torch.randn(batch, positions, heads, N + R, **random).requires_grad_() for _ in range(2))
    # As the model has it: values are a slice of what the latents expand to.
    value = torch.randn(batch, positions, heads, N + V, **random)[..., N:].requires_grad_()
    grad, inputs = torch.randn(batch, positions, heads, V, **random), [query, key, value]
    functions: Runs = {
        "benthic": lambda: ops.attention(*inputs, scale),
        "cuDNN": lambda: _torch_attention(SDPBackend.CUDNN_ATTENTION, *inputs, scale),
    }
    if _has_flash_attention_3():
        functions["FlashAttention 3"] = lambda: _flash_attention_3(*inputs, scale)
    shape, products = f"{batch}x{positions}, {heads} heads, 192/128", batch * heads * positions**2
    sizes = 2 * batch * positions * heads * (2 * (N + R) + V), 2 * batch * positions * heads * V
    check, backward_check = _some_heads(inputs, grad, scale)
    yield Case("attention", shape, functions, check, 2e-2, sum(sizes), 2 * products * (N + R + V) // 2)
    own = {name: function for name, function in functions.items() if name != "FlashAttention 3"}
    runs = backward(own, inputs, [grad])
    flops = 2 * products * (3 * (N + R) + 2 * V) // 2
    yield Case("attention backward", shape, runs, backward_check, 2e-2, 2 * sum(sizes), flops)


def _torch_attention(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale).transpose(1, 2)


@cache
def _has_flash_attention_3() -> bool:
    """Whether vLLM's build of it lies on the import path; vllm itself need not be importable."""
    builds = (Path(folder, "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so") for folder in sys.path)
    for build in filter(Path.is_file, builds):
        torch.ops.load_library(str(build))
        return True
    return False


def _flash_attention_3(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The forward operator of vLLM's build, over packed sequences of equal length; it has no backward pass."""
    batch, positions = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * positions, positions, dtype=torch.int32, device=query.device)
    packed = (x.detach().flatten(0, 1) for x in (query, key, value))
    out = torch.ops._vllm_fa3_C.fwd(
        *packed, None, None, None, None, starts, starts, None, None, None, positions, positions,
        None, None, None, None, None, None, None, None, None,
        scale, True, -1, -1, 0.0, True, None, 1, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip
    return out.view(batch, positions, *out.shape[1:])


def _some_heads(
    inputs: list[Tensor], grad: Tensor, scale: float
) -> tuple[Callable[[Any], float], Callable[[Any], float]]:
    """Checks of the result and of its gradients on two heads of the first sequence: all scores would not fit."""
    leaves = [x.detach()[:1, :, :2].float().requires_grad_() for x in inputs]
    heads_first = (x.transpose(1, 2) for x in leaves)
    with sdpa_kernel([SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale).transpose(1, 2)
    found = torch.autograd.grad(out, leaves, grad[:1, :, :2].float())
    check, check_gradients = error([out.detach()]), error(list(found))
    return lambda out: check(out[:1, :, :2]), lambda grads: check_gradients(tuple(x[:1, :, :2] for x in grads))


def _rotations(positions: int, width: int, device: str) -> Tensor:
    angles = torch.arange(positions, device=device)[:, None] * 10000 ** -torch.linspace(0, 1, width // 2, device=device)
    return torch.polar(torch.ones_like(angles), angles)

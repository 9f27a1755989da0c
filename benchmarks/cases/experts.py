"""The expert layer in bfloat16: sorting, rows, SwiGLU, routing, and torch's grouped product as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Case
from benthic.config import ModelConfig
from benthic.kernels import permutation, swiglu
from benthic.kernels import route as route_kernel
from benthic.numerics.reference import permutation as permutation_reference
from benthic.numerics.reference import swiglu as swiglu_reference
from benthic.ops import experts as expert_ops

route_ops = import_module("benthic.ops.route")  # `benthic.ops.route` is the function


class Shape(NamedTuple):
    """T tokens of width D, E experts of width F on this GPU, K chosen of `routed`, the width of a dense layer."""

    tokens: int
    width: int
    experts: int
    inner: int
    chosen: int
    routed: int
    dense: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}, {self.chosen} of {self.experts} experts of {self.inner}"


SHAPES = (Shape(16_384, 2_048, 64, 1_408, 6, 64, 10_944), Shape(8_192, 7_168, 32, 2_048, 8, 256, 18_432))
"""A step of the bench model (DeepSeek-V2-Lite's dimensions), and V3's layer as one of eight GPUs holds it."""


def cases(device: str) -> Iterator[Case]:
    """Every case, made when asked for."""
    for shape in SHAPES:
        for topic in (_rows_of, _activations_of, _weighted_of, _routing_of, _products_of, _layer_of):
            yield from topic(shape, device)


def _rows_of(shape: Shape, device: str) -> Iterator[Case]:
    picks, rows = _picks(shape, device), shape.tokens * shape.chosen
    _, places, _ = expected = permutation_reference.sort_by_expert(picks, shape.experts)
    yield Case(
        "sort by expert", str(shape),
        {
            "benthic": lambda: permutation.sort_by_expert(picks, shape.experts),
            "torch": lambda: permutation_reference.sort_by_expert(picks, shape.experts),
        },
        lambda out: max(_error(a, b) for a, b in zip(out, expected, strict=True)), 0.0,
        bytes=3 * 8 * rows,
    )  # fmt: skip
    x = _noise(device, shape.tokens, shape.width)
    tokens = expected[0]
    moved = 2 * (shape.chosen + 1) * x.numel()
    yield Case(
        "take rows", str(shape),
        {"benthic": lambda: permutation.take_rows(x, places), "torch index_select": lambda: x.index_select(0, tokens)},
        lambda out: _error(out, x[tokens]), 0.0, bytes=moved,
    )  # fmt: skip
    taken = x[tokens] * torch.rand(rows, 1, device=device).bfloat16()

    def gathered() -> Tensor:
        return taken[places].sum(1, dtype=torch.float32).bfloat16()

    yield Case(
        "sum choices", str(shape),
        {
            "benthic": lambda: permutation.sum_choices(taken, places),
            "torch": gathered,
            "torch.compile": torch.compile(gathered, dynamic=False),
            "torch index_add": lambda: torch.zeros_like(x).index_add_(0, tokens, taken),
        },
        lambda out: _error(out, taken[places].double().sum(1)), 1e-2, bytes=moved,
    )  # fmt: skip


def _activations_of(shape: Shape, device: str) -> Iterator[Case]:
    gate, up, grad = (_noise(device, shape.tokens, shape.dense) for _ in range(3))
    name = f"{shape.tokens}x{shape.dense}"

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    forward = {"benthic": lambda: swiglu.swiglu(gate, up), "torch": lambda: plain(gate, up)}
    forward["torch.compile"] = _compiled(plain, gate, up)
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    backward = {"benthic": lambda: swiglu.swiglu_backward(grad, gate, up), "torch": _gradient(plain, leaves, grad)}
    backward["torch.compile"] = _compiled(swiglu_reference.swiglu_backward, grad, gate, up)
    if find_spec("liger_kernel"):
        liger = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        forward["liger-kernel"] = lambda: liger.apply(gate, up)
        # Liger writes the gradients over what it saved, so that each call needs a forward before it.
        backward["liger-kernel, with forward"] = lambda: torch.autograd.grad(
            liger.apply(*(x.clone() for x in leaves)), leaves, grad
        )
    expected = swiglu_reference.swiglu(gate[:64].float(), up[:64].float())
    yield Case("swiglu", name, forward, lambda out: _error(out[:64], expected), 1e-2, bytes=3 * 2 * gate.numel())
    gradients = swiglu_reference.swiglu_backward(grad[:64].float(), gate[:64].float(), up[:64].float())
    yield Case(
        "swiglu backward", name, backward,
        lambda out: max(_error(a[:64], b) for a, b in zip(out, gradients, strict=True)), 1e-2,
        bytes=5 * 2 * gate.numel(),
    )  # fmt: skip


def _weighted_of(shape: Shape, device: str) -> Iterator[Case]:
    rows = shape.tokens * shape.chosen
    hidden, grad = _noise(device, rows, 2 * shape.inner), _noise(device, rows, shape.inner)
    weights, name, size = torch.rand(rows, device=device), f"{rows}x{shape.inner}", 2 * rows * shape.inner

    def plain(hidden: Tensor, weights: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, -1)
        return (F.silu(gate) * up * weights[:, None]).bfloat16()

    expected = swiglu_reference.weighted_swiglu(hidden[:64].float(), weights[:64])
    yield Case(
        "weighted swiglu", name,
        {
            "benthic": lambda: swiglu.weighted_swiglu(hidden, weights),
            "torch": lambda: plain(hidden, weights),
            "torch.compile": _compiled(swiglu_reference.weighted_swiglu, hidden, weights),
        },
        lambda out: _error(out[:64], expected), 1e-2, bytes=3 * size,
    )  # fmt: skip
    gradients = swiglu_reference.weighted_swiglu_backward(grad[:64].float(), hidden[:64].float(), weights[:64])
    leaves = [x.detach().requires_grad_() for x in (hidden, weights)]
    autograd = _gradient(plain, leaves, grad)
    yield Case(
        "weighted swiglu backward, with the activation", name,
        {
            "benthic": lambda: swiglu.weighted_swiglu_backward(grad, hidden, weights),
            "torch": lambda: (*autograd(), plain(hidden, weights)),
            "torch.compile": _compiled(swiglu_reference.weighted_swiglu_backward, grad, hidden, weights),
        },
        lambda out: max(_error(a[:64], b) for a, b in zip(out, gradients, strict=True)), 1e-2, bytes=6 * size,
    )  # fmt: skip


def _routing_of(shape: Shape, device: str) -> Iterator[Case]:
    config = ModelConfig.from_pretrained("deepseek-v3")
    if shape.routed != config.n_routed_experts:
        changes = {"n_routed_experts": shape.routed, "num_experts_per_tok": shape.chosen}
        config = config.replace(n_group=1, topk_group=1, **changes)
    experts = shape.routed
    logits, bias = torch.randn(shape.tokens, experts, device=device), 0.1 * torch.randn(experts, device=device)
    name = f"{shape.tokens} tokens, {shape.chosen} of {experts}, {config.topk_group} of {config.n_group} groups"
    compiled = torch.compile(route_ops._composed, dynamic=False)
    scores, picked, weights = expected = route_ops._composed(logits, bias, config)

    def routing_error(out: Any) -> float:
        dense = [torch.zeros_like(scores).scatter_(1, found.experts, found.weights) for found in (out, expected)]
        return max(_error(out.scores, scores), _error(*dense))

    yield Case(
        "route", name,
        {
            "benthic": lambda: route_ops.Routing(*route_kernel.route(logits, bias, config)),
            "torch": lambda: route_ops._composed(logits, bias, config),
            "torch.compile": lambda: compiled(logits, bias, config),
        },
        routing_error, 1e-2,  # a token whose scores tie to the last bit may go another way
        bytes=8 * logits.numel() + 12 * weights.numel(),
    )  # fmt: skip
    leaf, grads = logits.clone().requires_grad_(), (torch.randn_like(scores), torch.randn_like(weights))
    routed = route_ops._composed(leaf, bias, config)

    def autograd() -> Tensor:
        return torch.autograd.grad([routed.scores, routed.weights], leaf, grads, retain_graph=True)[0]

    gradient = autograd()
    yield Case(
        "route backward", name,
        {"benthic": lambda: route_kernel.route_backward(*grads, scores, picked, config), "torch": autograd},
        lambda out: _error(out, gradient), 1e-4, bytes=12 * logits.numel() + 12 * weights.numel(),
    )  # fmt: skip
    x, weight = _noise(device, shape.tokens, shape.width), _noise(device, experts, shape.width)
    product = x.double() @ weight.double().T
    yield Case(
        "router logits", f"{name}, width {shape.width}",
        {
            "benthic": lambda: route_ops.router_logits(x, weight),
            "torch, both cast to float32": lambda: F.linear(x.float(), weight.float()),
        },
        lambda out: _error(out, product), 1e-5,
        bytes=2 * (x.numel() + weight.numel()) + 4 * product.numel(), flops=2 * x.numel() * experts,
    )  # fmt: skip


def _products_of(shape: Shape, device: str) -> Iterator[Case]:
    _, _, ends = permutation_reference.sort_by_expert(_picks(shape, device), shape.experts)
    sizes, rows = ends.diff(prepend=ends.new_zeros(1)).tolist(), shape.tokens * shape.chosen
    x, grad = _noise(device, rows, shape.width), _noise(device, rows, 2 * shape.inner)
    weight = _noise(device, shape.experts, 2 * shape.inner, shape.width)
    flops = 2 * rows * weight[0].numel()
    moved = 2 * (x.numel() + grad.numel() + weight.numel())

    def each(left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(left.split(sizes), right.split(sizes) if right.ndim == 2 else right, strict=True))

    pieces = {
        "forward": (
            lambda: expert_ops._product(x, weight.transpose(1, 2), ends),
            lambda: torch.cat([part @ own.T for part, own in each(x, weight)]),
        ),
        "input gradient": (
            lambda: expert_ops._product(grad, weight, ends),
            lambda: torch.cat([part @ own for part, own in each(grad, weight)]),
        ),
        "weight gradient": (
            lambda: expert_ops._weight_gradient(grad, x, ends),
            lambda: torch.stack([part.T @ other for part, other in each(grad, x)]),
        ),
    }
    for name, (grouped, loop) in pieces.items():
        expected = loop()
        yield Case(
            f"grouped bf16 product, {name}", str(shape), {"benthic": grouped, "torch.mm in a loop": loop},
            lambda out, expected=expected: _error(out, expected), 1e-2, bytes=moved, flops=flops,
        )  # fmt: skip


def _layer_of(shape: Shape, device: str) -> Iterator[Case]:
    picks = _picks(shape, device)
    x, direction = (_noise(device, shape.tokens, shape.width) for _ in range(2))
    weights = torch.rand(picks.shape, device=device)
    gate_up = _noise(device, shape.experts, 2 * shape.inner, shape.width) * shape.width**-0.5
    down = _noise(device, shape.experts, shape.width, shape.inner) * shape.inner**-0.5
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weights, gate_up, down)]

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return expert_ops.routed_experts(x, picks, weights, gate_up, down)

    def composed(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens, places, ends = permutation_reference.sort_by_expert(picks, shape.experts)
        hidden = F.grouped_mm(x.index_select(0, tokens), gate_up.transpose(1, 2), offs=ends)
        gate, up = hidden.chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        out = out.index_select(0, places.flatten()).view(*picks.shape, -1)
        return (out.float() * weights[..., None]).sum(1).type_as(x)

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, direction)

    expected = both(composed)()
    weight_bytes = 2 * (gate_up.numel() + down.numel())
    yield Case(
        "expert layer, forward and backward", str(shape), {"benthic": both(layer), "torch": both(composed)},
        lambda out: max(_error(a, b) for a, b in zip(out, expected, strict=True)), 2e-2,
        bytes=3 * weight_bytes + 5 * 2 * x.numel(), flops=18 * picks.numel() * shape.width * shape.inner,
    )  # fmt: skip


def _picks(shape: Shape, device: str) -> Tensor:
    """Experts int64 [T, K], some twice as likely as others: loads are never even."""
    likely = torch.linspace(1, 2, shape.experts, device=device).expand(shape.tokens, -1)
    return torch.multinomial(likely, shape.chosen)


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _compiled(function: Callable[..., Any], *arguments: Tensor) -> Callable[[], Any]:
    compiled = torch.compile(function, dynamic=False)
    return lambda: compiled(*arguments)


def _gradient(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, row by row so that no second copy of a large tensor is made in float32."""
    parts = [
        torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()])
        for a, b in zip(found.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True)
    ]
    difference, size = torch.stack(parts).double().sum(0).sqrt().tolist()
    return difference / max(size, 1e-30)

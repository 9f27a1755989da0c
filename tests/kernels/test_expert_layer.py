"""The GPU's path through the expert layer, put together, against the references and autograd.

Without a GPU the same Functions run on the processor, with the kernels in Triton's interpreter.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from benthic import ops
from benthic.numerics.reference import experts as reference_experts
from benthic.numerics.reference import routing as reference_routing
from tests.kernels.test_route import config_of, inputs

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned", "kernels_everywhere")
# In `benthic.ops` the functions of these names stand before their modules.
swiglu, route = import_module("benthic.ops.swiglu"), import_module("benthic.ops.route")


@pytest.fixture
def kernels_everywhere(monkeypatch):
    for module in (ops.permutation, swiglu):
        kernels = import_module(module.__name__.replace(".ops.", ".kernels."))
        monkeypatch.setattr(module, "_implementation", lambda x, kernels=kernels: kernels)
    if not torch.cuda.is_available():  # mm to another dtype exists on GPUs alone
        monkeypatch.setattr(route, "_product", lambda left, right: left.float() @ right.float())


def noise(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))


def results(function, picks: Tensor, leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, weights, gate_up_proj and down_proj."""
    x, weights, gate_up, down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    out = function(x, picks, weights, gate_up, down)
    return [out.detach(), *torch.autograd.grad(out, [x, weights, gate_up, down], direction)]


LOADS = {
    "spread": lambda tokens, experts, chosen: torch.rand(tokens, experts).topk(chosen).indices,
    "on the first": lambda tokens, experts, chosen: torch.arange(chosen).expand(tokens, chosen),
    "on the last": lambda tokens, experts, chosen: torch.arange(experts - chosen, experts).expand(tokens, chosen),
}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 4, 1), (13, 16, 3), (40, 4, 4)])
def test_grouped_experts_and_their_gradients(tokens, experts, chosen, load, dtype, allowed, device):
    torch.manual_seed(0)
    picks = LOADS[load](tokens, experts, chosen).to(device)
    width, inner = 24, 16
    leaves = [noise(tokens, width, device=device), noise(experts, 2 * inner, width, device=device) * 0.3]
    x, gate_up, down = (leaf.to(dtype) for leaf in (*leaves, noise(experts, width, inner, device=device) * 0.3))
    weights = noise(tokens, chosen, device=device).abs()
    direction = noise(tokens, width, device=device, seed=3).to(dtype)
    actual = results(ops.experts._grouped, picks, [x, weights, gate_up, down], direction)
    leaves = [x.float(), weights, gate_up.float(), down.float()]
    expected = results(reference_experts.routed_experts, picks, leaves, direction.float())
    for ours, theirs, dtype_of in zip(actual, expected, [dtype, dtype, torch.float32, dtype, dtype], strict=True):
        assert ours.dtype == dtype_of
        assert relative_error(ours, theirs) < allowed
    empty = torch.bincount(picks.flatten(), minlength=experts) == 0
    assert not actual[3][empty].any()
    assert not actual[4][empty].any()


@pytest.mark.parametrize("function", ["_grouped", "routed_experts"])
def test_choices_of_none_give_nothing(function, device):
    """As the same choices with a weight of zero, gradients too."""
    picks = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)).topk(3).indices.to(device)
    none = noise(30, 3, device=device, seed=5) < 0.3
    leaves = [noise(*shape, device=device) for shape in ((30, 24), (30, 3), (8, 32, 24), (8, 24, 16))]
    if device == "cuda":
        leaves = [leaf if index == 1 else leaf.bfloat16() for index, leaf in enumerate(leaves)]
    direction = leaves[0].flip(0)
    calls = getattr(ops.experts, function)
    count = int((~none).sum())

    def some(x, picks, weights, gate_up, down):
        return calls(x, picks.masked_fill(none, -1), weights, gate_up, down, count)

    def zeros(x, picks, weights, gate_up, down):
        return calls(x, picks, weights.masked_fill(none, 0.0), gate_up, down)

    allowed = 2e-2 if device == "cuda" else 1e-5
    for found, expected in zip(
        results(some, picks, leaves, direction), results(zeros, picks, leaves, direction), strict=True
    ):
        assert relative_error(found, expected) < allowed


def test_no_tokens_give_no_rows_and_zero_gradients(device):
    leaves = [noise(*shape, device=device) for shape in ((0, 8), (0, 3), (4, 16, 8), (4, 8, 8))]
    picks = torch.zeros(0, 3, dtype=torch.int64, device=device)
    out, grad_x, grad_weights, *grads = results(ops.experts._grouped, picks, leaves, leaves[0])
    assert (out.shape, grad_x.shape, grad_weights.shape) == ((0, 8), (0, 8), (0, 3))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves[2:]]
    assert not any(grad.any() for grad in grads)


def test_the_same_bits_on_every_run(device):
    torch.manual_seed(0)
    picks = torch.rand(50, 8).topk(3).indices.to(device)
    leaves = [noise(*shape, device=device) for shape in ((50, 24), (50, 3), (8, 32, 24), (8, 24, 16))]
    leaves = [leaf if index == 1 else leaf.bfloat16() for index, leaf in enumerate(leaves)]
    first, *others = [results(ops.experts._grouped, picks, leaves, leaves[0]) for _ in range(3)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_taking_and_summing_are_each_others_gradient(device):
    permutation = ops.permutation.sort_by_expert(torch.tensor([[2, 0], [0, 1], [2, 1]], device=device), 3)
    x, residual = (noise(3, 5, device=device, seed=seed).requires_grad_() for seed in range(2))
    rows = ops.permutation.take_rows(x, permutation)
    out = ops.permutation.sum_choices(rows, permutation, residual)
    torch.testing.assert_close(out, 2 * x + residual)
    direction = noise(3, 5, device=device, seed=2)
    grad_x, grad_residual = torch.autograd.grad(out, [x, residual], direction)
    torch.testing.assert_close(grad_x, 2 * direction)
    torch.testing.assert_close(grad_residual, direction)


def test_swiglu_functions_give_autograds_gradients(device):
    hidden, weights = noise(7, 26, device=device).requires_grad_(), noise(7, device=device).requires_grad_()
    gate, up = hidden.chunk(2, -1)
    plain = torch.nn.functional.silu(gate) * up
    direction = noise(7, 13, device=device, seed=1)
    pairs = [
        (swiglu._Swiglu.apply(gate, up), plain, [hidden]),
        (swiglu.weighted_swiglu(hidden, weights), plain * weights[:, None], [hidden, weights]),
    ]
    for ours, theirs, leaves in pairs:
        torch.testing.assert_close(ours, theirs)
        found = torch.autograd.grad(ours, leaves, direction, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves, direction, retain_graph=True))


@pytest.mark.parametrize("name", ["v3", "v2: groups of twenty"])
def test_routing_gives_autograds_gradient(name, device):
    config = config_of(name)
    logits, bias = inputs(config, 5, "cpu")
    gradients = []
    for function, place in ((route._Route.apply, device), (reference_routing.route, "cpu")):
        leaf = logits.clone().to(place).requires_grad_()
        scores, experts, weights = function(leaf, None if bias is None else bias.to(place), config)
        assert not experts.requires_grad
        loss = (weights * noise(*weights.shape, device=place)).sum() + scores.square().sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0].cpu())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_router_logits_of_bfloat16_are_the_float32_product(device):
    x, weight = (noise(*shape, device=device).bfloat16().requires_grad_() for shape in ((9, 24), (8, 24)))
    logits = route._RouterLogits.apply(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)
    direction = noise(9, 8, device=device)
    found = torch.autograd.grad(logits, [x, weight], direction)
    expected = torch.autograd.grad(x.float() @ weight.float().T, [x, weight], direction)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    parts = route._three_parts(direction)
    assert torch.equal(parts.float().view(9, 3, 8).double().sum(1).float(), direction)

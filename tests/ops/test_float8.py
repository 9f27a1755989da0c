"""FP8 products against float32 ones: how near they are, what they keep, and that nothing depends on sharing."""

import pytest
import torch
from torch.nn.functional import silu

from benthic.numerics.reference import quantise as plain
from benthic.ops import float8

FP8_ERROR = 0.05
"""Relative error of a product of two e4m3 operands: 2^-4 at most and 2.5% on average for each element of each."""


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def kept_bytes(call) -> int:
    """Bytes that `call` saves for backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        call()
    return sum(sizes)


def linear_case(tokens: int = 40, into: int = 272, out: int = 144):
    x, weight = random(2, tokens // 2, into).requires_grad_(), random(out, into, seed=1).requires_grad_()
    return x, weight, float8.quantise_weight(weight), random(2, tokens // 2, out, seed=2)


def test_a_linear_layer_multiplies_the_quantised_operands_exactly():
    x, weight, quantised, _ = linear_case()
    found = float8.linear_fp8(x, (weight,), quantised)
    left = plain.dequantise_rows(*plain.quantise_rows(x.detach().flatten(0, 1), power_of_two=True))
    right = plain.dequantise_weights(*plain.quantise_weights(weight.detach()[None]))[0]
    torch.testing.assert_close(found.flatten(0, 1), (left @ right.T).bfloat16())


@pytest.mark.parametrize("of_output", [False, True])
def test_gradients_of_a_linear_layer_are_near_those_in_float32(of_output):
    x, weight, quantised, grad = linear_case()
    if of_output:
        found = float8.output_linear_fp8(x, weight, quantised)
    else:
        found = float8.linear_fp8(x, (weight,), quantised)
    found.backward(grad)
    wanted_x, wanted_weight = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    out = torch.nn.functional.linear(wanted_x, wanted_weight)
    out.backward(grad.float())
    assert relative(found, out) < FP8_ERROR
    assert relative(x.grad, wanted_x.grad) < FP8_ERROR
    assert relative(weight.grad, wanted_weight.grad) < FP8_ERROR
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_stacked_matrices_give_each_its_own_gradient():
    x, weight, _, grad = linear_case()
    other = random(128, 272, seed=3).requires_grad_()
    grad = torch.cat((grad, grad), 2)[..., :272]
    float8.linear_fp8(x, (other, weight), float8.quantise_weight(other, weight)).backward(grad)
    assert other.grad.shape == other.shape
    assert weight.grad.shape == weight.shape
    expected = grad.flatten(0, 1).float().T @ x.detach().flatten(0, 1).float()
    assert relative(torch.cat((other.grad, weight.grad)), expected) < FP8_ERROR


def test_a_shared_input_changes_no_bit():
    x, weight, quantised, grad = linear_case()
    float8.linear_fp8(x, (weight,), quantised).backward(grad)
    alone = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    float8.linear_fp8(x, (weight,), quantised, float8.quantise_activation(x)).backward(grad)
    assert torch.equal(x.grad, alone[0])
    assert torch.equal(weight.grad, alone[1])


def test_a_token_of_small_gradient_keeps_it_beside_large_ones():
    """By blocks of 128 x 128 it would have vanished below e4m3's smallest number."""
    x, weight, quantised, grad = linear_case()
    grad[0, 0] *= 2.0**-24
    float8.linear_fp8(x, (weight,), quantised).backward(grad)
    assert relative(x.grad[0, 0], grad[0, 0].float() @ weight.detach().float()) < FP8_ERROR


def test_a_linear_layer_keeps_one_byte_an_element():
    x, weight, quantised, _ = linear_case(into=256)
    assert kept_bytes(lambda: float8.linear_fp8(x, (weight,), quantised)) == x.numel() * (1 + 4 / 128)
    assert kept_bytes(lambda: float8.output_linear_fp8(x, weight, quantised)) == x.nbytes


def test_partial_sums_over_groups_of_tokens_add_up(monkeypatch):
    x, weight, quantised, grad = linear_case(tokens=300)
    float8.linear_fp8(x, (weight,), quantised).backward(grad)
    whole, weight.grad = weight.grad, None
    split = float8.arithmetic("cpu")._replace(token_groups=lambda *_: 3)
    monkeypatch.setattr(float8, "arithmetic", lambda device_type: split)
    float8.linear_fp8(x, (weight,), quantised).backward(grad)
    assert relative(weight.grad, whole) < FP8_ERROR


def feed_forward(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("inner", [128, 208])
def test_a_feed_forward_and_its_gradients_are_near_float32(inner):
    x = random(3, 21, 64)
    weights = [random(inner, 64, seed=1), random(inner, 64, seed=2), random(64, inner, seed=3)]
    weights = [weight * weight.shape[1] ** -0.5 for weight in weights]
    narrow = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    wide = [tensor.float().requires_grad_() for tensor in (x, *weights)]
    copies = float8.quantise_weight(*narrow[1:3]), float8.quantise_weight(narrow[3])
    found, expected = float8.feed_forward_fp8(narrow[0], tuple(narrow[1:]), *copies), feed_forward(*wide)
    grad = random(*found.shape, seed=4)
    found.backward(grad)
    expected.backward(grad.float())
    assert relative(found, expected) < 2 * FP8_ERROR
    for one, other in zip(narrow, wide, strict=True):
        assert relative(one.grad, other.grad) < 2 * FP8_ERROR


def experts_case(tokens: int, chosen: torch.Tensor):
    x, residual = random(tokens, 64), random(tokens, 64, seed=5)
    gate_up, down = random(5, 2 * 48, 64, seed=1, scale=0.125), random(5, 64, 48, seed=2, scale=0.15)
    weights = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(3))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, gate_up, down, residual)]
    return leaves, (float8.quantise_weight(gate_up), float8.quantise_weight(down))


def test_experts_and_their_gradients_are_near_float32_with_one_that_has_no_tokens():
    chosen = torch.randint(0, 4, (37, 2), generator=torch.Generator().manual_seed(0))  # never expert 4
    leaves, copies = experts_case(37, chosen)
    x, weights, gate_up, down, residual = leaves
    found = float8.routed_experts_fp8(x, chosen, weights, (gate_up, down), *copies, residual=residual)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    rows = []
    for token, (experts, mine) in enumerate(zip(chosen.tolist(), wide[1], strict=True)):
        parts = [
            feed_forward(wide[0][token], *wide[2][expert].chunk(2), wide[3][expert]) * weight
            for expert, weight in zip(experts, mine, strict=True)
        ]
        rows.append(sum(parts) + wide[4][token])
    expected = torch.stack(rows)
    grad = random(37, 64, seed=6)
    found.backward(grad)
    expected.backward(grad.float())
    assert relative(found, expected) < FP8_ERROR
    for leaf, other in zip(leaves, wide, strict=True):
        assert relative(leaf.grad, other.grad) < 2 * FP8_ERROR
    assert not gate_up.grad[4].any()
    assert not down.grad[4].any()


def test_choices_of_none_are_those_of_no_weight():
    chosen = torch.randint(0, 4, (37, 2), generator=torch.Generator().manual_seed(0))
    none = torch.rand(37, 2, generator=torch.Generator().manual_seed(1)) < 0.3
    gradients = []
    for experts, count in ((chosen.masked_fill(none, -1), int((~none).sum())), (chosen, None)):
        (x, weights, gate_up, down, residual), copies = experts_case(37, chosen)
        seen = weights.masked_fill(none, 0.0)
        parameters = gate_up, down
        out = float8.routed_experts_fp8(x, experts, seen, parameters, *copies, residual=residual, count=count)
        gradients.append([out, *torch.autograd.grad(out, (x, weights, gate_up, down), random(37, 64, seed=6))])
    for found, expected in zip(*gradients, strict=True):
        assert relative(found, expected) < FP8_ERROR


def test_experts_keep_one_byte_an_element():
    chosen = torch.randint(0, 5, (64, 2), generator=torch.Generator().manual_seed(0))
    x, gate_up, down = random(64, 128), random(5, 256, 128), random(5, 128, 128)
    weights = torch.ones(64, 2)
    copies = float8.quantise_weight(gate_up), float8.quantise_weight(down)
    parameters = gate_up.requires_grad_(), down.requires_grad_()
    kept = kept_bytes(lambda: float8.routed_experts_fp8(x, chosen, weights, parameters, *copies))
    numbers = 64 * 128 + 128 * 256  # x once, and what SwiGLU takes for every choice
    permutation = 128 * (8 + 8 + 4) + 5 * 4
    assert kept == numbers * (1 + 4 / 128) + permutation


def test_experts_of_no_tokens_give_none_and_no_gradient():
    leaves, copies = experts_case(0, torch.zeros(0, 2, dtype=torch.int64))
    x, weights, gate_up, down, _ = leaves
    out = float8.routed_experts_fp8(x, torch.zeros(0, 2, dtype=torch.int64), weights, (gate_up, down), *copies)
    out.sum().backward()
    assert out.shape == (0, 64)
    assert not gate_up.grad.any()

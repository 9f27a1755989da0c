"""Products with matrices in FP8, on the processor: the numbers of the matrices given back; and the arithmetic that a
Hopper GPU uses where rows are many, by its references."""

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference.experts import routed_experts
from benthic.numerics.reference.quantisation import dequantise_blocks, quantise_blocks
from benthic.ops import float8_storage
from benthic.ops.float8_storage import experts_from_float8, linear_from_float8


def experts_of(tokens, dtype):
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 160, generator=stream).to(dtype)
    chosen = torch.stack([torch.randperm(6, generator=stream)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=stream)
    gate_up = torch.randn(6, 2 * 128, 160, generator=stream) / 13
    down = torch.randn(6, 160, 128, generator=stream) / 11
    stored = [[quantise_blocks(matrix) for matrix in stack] for stack in (gate_up, down)]
    plain = [torch.stack([dequantise_blocks(*one) for one in stack]) for stack in stored]
    both = [torch.stack(part) for stack in stored for part in zip(*stack, strict=True)]
    return (x, chosen, weights), both, plain


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_a_linear_layer_uses_the_factors(tokens):
    torch.manual_seed(0)
    x, stored = torch.randn(2, tokens, 200), quantise_blocks(torch.randn(150, 200) / 14)
    assert_close(linear_from_float8(x, *stored), x @ dequantise_blocks(*stored).T, "operation_fp32")


@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
def test_experts_use_their_factors(tokens):
    if tokens:
        routed, stored, plain = experts_of(tokens, torch.float32)
    else:
        routed, stored, plain = experts_of(1, torch.float32)
        routed = [part[:0] for part in routed]
    assert_close(experts_from_float8(*routed, *stored), routed_experts(*routed, *plain), "operation_fp32")


def test_many_rows_are_quantised_where_fp8_is_multiplied(monkeypatch):
    monkeypatch.setattr(float8_storage, "_quantises", lambda x: True)
    torch.manual_seed(0)
    x, stored = torch.randn(2, 70, 200).bfloat16(), quantise_blocks(torch.randn(150, 200) / 14)
    exact = x.float() @ dequantise_blocks(*stored).T
    error = (linear_from_float8(x, *stored).float() - exact).norm() / exact.norm()
    assert 0.01 < error < 0.04
    few = linear_from_float8(x[:, :32], *stored).float() - exact[:, :32]
    assert few.norm() < 0.005 * exact[:, :32].norm()


def test_many_rows_of_experts_are_quantised_where_fp8_is_multiplied(monkeypatch):
    monkeypatch.setattr(float8_storage, "_quantises", lambda x: True)
    monkeypatch.setattr(float8_storage, "MOST_PAIRS", 64)
    routed, stored, plain = experts_of(70, torch.bfloat16)
    exact = routed_experts(routed[0].float(), *routed[1:], *plain)
    error = (experts_from_float8(*routed, *stored).float() - exact).norm() / exact.norm()
    assert 0.01 < error < 0.06

"""A decoding step's experts against the reference, on the processor."""

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference import expert_decode as reference
from benthic.numerics.reference.quantisation import quantise_blocks
from benthic.ops.expert_decode import few_token_experts, few_token_experts_fp8


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 160, generator=generator)
    experts = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    gate_up = torch.randn(6, 2 * 72, 160, generator=generator) / 13
    return x, experts, weights, gate_up, torch.randn(6, 160, 72, generator=generator) / 9


@pytest.mark.parametrize("tokens", [1, 7])
def test_float_weights(tokens):
    arguments = inputs(tokens)
    assert_close(few_token_experts(*arguments), reference.few_token_experts(*arguments), "operation_fp32")


@pytest.mark.parametrize("tokens", [1, 7])
def test_fp8_weights_are_used_with_their_factors(tokens):
    x, experts, weights, gate_up, down = inputs(tokens)
    halves = [[quantise_blocks(half) for half in rows.chunk(2)] for rows in gate_up]
    downs = [quantise_blocks(rows) for rows in down]
    arguments = (
        x, experts, weights,
        torch.stack([torch.cat([values for values, _ in both]) for both in halves]),
        torch.stack([torch.cat([factors for _, factors in both]) for both in halves]),
        torch.stack([values for values, _ in downs]), torch.stack([factors for _, factors in downs]),
    )  # fmt: skip
    expected = reference.few_token_experts_fp8(*arguments)
    assert_close(few_token_experts_fp8(*arguments), expected, "operation_fp32")
    exact = reference.few_token_experts(x, experts, weights, gate_up, down)
    assert (expected - exact).norm() < 0.06 * exact.norm()

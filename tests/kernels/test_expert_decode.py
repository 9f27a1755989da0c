"""Experts for few tokens against plain torch in float32, with poisoned intermediates."""

import pytest
import torch

from benthic.numerics.reference import expert_decode as reference
from benthic.numerics.reference.quantisation import quantise_blocks

kernels = pytest.importorskip("benthic.kernels.expert_decode", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def arguments_of(tokens, chosen, count, width, inner, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(DTYPE)
    experts = torch.stack([torch.randperm(count, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator)
    gate_up = torch.randn(count, 2 * inner, width, generator=generator).to(DTYPE) * width**-0.5
    down = torch.randn(count, width, inner, generator=generator).to(DTYPE) * inner**-0.5
    return [tensor.to(device) for tensor in (x, experts, weights, gate_up, down)]


def assert_agree(actual, expected):
    assert actual.dtype == expected.dtype
    error = (actual.cpu().float() - expected.cpu().float()).norm() / expected.cpu().float().norm()
    assert error < 5e-3


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 6), (3, 2), (17, 8), (33, 3)])
def test_a_few_tokens_equal_the_reference(tokens, chosen, device):
    arguments = arguments_of(tokens, chosen, 10, 160, 72, device)
    assert_agree(kernels.few_token_experts(*arguments), reference.few_token_experts(*arguments))


@pytest.mark.parametrize(("tokens", "chosen", "shared"), [(1, 6, 2), (3, 2, 1), (34, 2, 2)])
def test_a_shared_network_is_added(tokens, chosen, shared, device):
    arguments = arguments_of(tokens, chosen, 7, 160, 72, device)
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(2 * shared * 72, 160, generator=generator).to(device, DTYPE) * 160**-0.5
    down = torch.randn(160, shared * 72, generator=generator).to(device, DTYPE) * (shared * 72) ** -0.5
    expected = reference.few_token_experts(*arguments, gate_up, down)
    assert_agree(kernels.few_token_experts(*arguments, gate_up, down), expected)


def test_a_shared_network_of_another_width_is_refused(device):
    arguments = arguments_of(2, 2, 4, 64, 32, device)
    gate_up, down = (torch.zeros(shape, device=device, dtype=DTYPE) for shape in ((96, 64), (64, 48)))
    with pytest.raises(ValueError, match=r"shared_gate_up \[96, 64\] and shared_down \[64, 48\] are not as wide"):
        kernels.few_token_experts(*arguments, gate_up, down)


def test_an_expert_that_everyone_chose_is_computed_for_all(device):
    x, experts, *rest = arguments_of(34, 2, 8, 64, 40, device)
    experts[:, 0] = 5
    experts[:, 1] = torch.where(experts[:, 1] == 5, 6, experts[:, 1])
    assert_agree(kernels.few_token_experts(x, experts, *rest), reference.few_token_experts(x, experts, *rest))


@pytest.mark.parametrize(("width", "inner"), [(256, 128), (160, 136)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fp8_weights_are_multiplied_by_their_factors(tokens, width, inner, device):
    x, experts, weights, gate_up, down = arguments_of(tokens, 2, 4, width, inner, "cpu")
    # Blocks of very different size; the interpreter (3.6) cuts subnormal e4m3 numbers, so there are none.
    gate_up = (gate_up.sign() * (gate_up.abs().clamp(min=0.1))).float()
    gate_up[:, :inner] *= torch.arange(1, 5)[:, None, None]
    down = down.sign() * down.abs().clamp(min=0.1)
    gates, gate_scales, ups, up_scales, downs, down_scales = [], [], [], [], [], []
    for expert in range(4):
        for rows, values, scales in (
            (gate_up[expert, :inner], gates, gate_scales),
            (gate_up[expert, inner:], ups, up_scales),
            (down[expert].float(), downs, down_scales),
        ):
            quantised = quantise_blocks(rows)
            values.append(quantised[0])
            scales.append(quantised[1])
    arguments = [
        x, experts, weights, torch.cat((torch.stack(gates), torch.stack(ups)), 1),
        torch.cat((torch.stack(gate_scales), torch.stack(up_scales)), 1), torch.stack(downs), torch.stack(down_scales),
    ]  # fmt: skip
    expected = reference.few_token_experts_fp8(*arguments)
    actual = kernels.few_token_experts_fp8(*[tensor.to(device) for tensor in arguments])
    assert_agree(actual, expected)


def test_the_same_call_gives_the_same_bits(device):
    arguments = arguments_of(12, 4, 6, 128, 64, device)
    first, second = (kernels.few_token_experts(*arguments) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_to_do_and_too_much(device):
    x, experts, weights, *rest = arguments_of(1, 2, 4, 64, 32, device)
    assert kernels.few_token_experts(x[:0], experts[:0], weights[:0], *rest).shape == (0, 64)
    with pytest.raises(ValueError, match=r"2400 choices of experts; this kernel is for up to 2048"):
        kernels.few_token_experts(*arguments_of(1200, 2, 4, 64, 32, device))

"""FP8 blocks: shapes, the format's error bound, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import NumericsError
from benthic.numerics.reference.quantisation import dequantise_blocks, quantise_blocks


def weights(rows, columns, seed, exponent=0):
    stream = torch.Generator().manual_seed(seed)
    spread = 10 ** (2 * torch.randn(rows, columns, generator=stream))
    return torch.randn(rows, columns, generator=stream) * spread * 10.0**exponent


def by_hand(weight, block):
    """Scales one block at a time, sliced and not padded."""
    height, width = block
    rows = range(0, weight.shape[0], height)
    columns = range(0, weight.shape[1], width)
    return torch.tensor([[weight[r : r + height, c : c + width].abs().max() / 448 for c in columns] for r in rows])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from([(8, 8), (16, 8), (5, 7), (64, 64)]),
    exponent=st.integers(-42, 30),
    power_of_two=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_element_is_within_the_formats_bound(rows, columns, block, exponent, power_of_two, seed):
    weight = weights(rows, columns, seed, exponent).clamp(-3e38, 3e38)
    values, scale_inv = quantise_blocks(weight, block, power_of_two)
    assert values.dtype == torch.float8_e4m3fn
    assert scale_inv.dtype == torch.float32
    restored = dequantise_blocks(values, scale_inv, block)
    spread = scale_inv.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    bound = torch.maximum(weight.abs() * 2**-4, spread * 2**-10) * (1 + 1e-5)
    assert ((restored - weight).abs() <= bound).all()


@pytest.mark.parametrize(("shape", "grid"), [((576, 256), (5, 2)), ((1, 1), (1, 1)), ((128, 129), (1, 2))])
def test_ragged_blocks_have_scales_of_their_own(shape, grid):
    weight = weights(*shape, seed=1)
    weight[512:] *= 1e-3
    _, scale_inv = quantise_blocks(weight)
    assert scale_inv.shape == grid
    torch.testing.assert_close(scale_inv, by_hand(weight, (128, 128)), rtol=1e-6, atol=0)


def test_the_largest_of_a_block_becomes_448():
    values, scale_inv = quantise_blocks(torch.tensor([[1.0, -3.5], [0.25, 0.0]]), (2, 2))
    assert scale_inv.item() == 3.5 / 448
    assert values.float().tolist() == [[128.0, -448.0], [32.0, 0.0]]


def test_blocks_of_zeros_keep_zeros_and_a_harmless_scale():
    values, scale_inv = quantise_blocks(torch.zeros(130, 3))
    assert scale_inv.tolist() == [[1.0], [1.0]]
    assert dequantise_blocks(values, scale_inv).eq(0).all()


def test_power_of_two_scales_are_rounded_up_and_survive_e8m0():
    weight = weights(300, 260, seed=3)
    _, plain = quantise_blocks(weight)
    _, rounded = quantise_blocks(weight, power_of_two=True)
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert ((rounded >= plain) & (rounded < 2 * plain)).all()
    assert torch.equal(rounded.to(torch.float8_e8m0fnu).float(), rounded)


def test_an_exact_power_of_two_is_not_rounded_further():
    _, scale_inv = quantise_blocks(torch.tensor([[448.0 * 4]]), power_of_two=True)
    assert scale_inv.item() == 4.0


def test_bfloat16_weights_are_quantised_in_float32_and_given_back_in_any_dtype():
    weight = weights(30, 20, seed=4).bfloat16()
    values, scale_inv = quantise_blocks(weight)
    again, _ = quantise_blocks(weight.float())
    assert torch.equal(values.float(), again.float())
    assert dequantise_blocks(values, scale_inv, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_position(bad, power_of_two):
    weight = torch.ones(4, 5)
    weight[2, 3] = weight[3, 1] = bad
    with pytest.raises(NumericsError, match=r"2 of 20 elements are not finite, the first .* at \[2, 3\]"):
        quantise_blocks(weight, power_of_two=power_of_two)


def test_scales_of_the_wrong_shape_are_refused():
    values, _ = quantise_blocks(torch.ones(130, 4))
    with pytest.raises(ValueError, match=r"scale_inv is \[1, 1\]; .* need \[2, 1\]"):
        dequantise_blocks(values, torch.ones(1, 1))

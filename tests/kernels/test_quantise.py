"""Quantised values and scales equal the reference's, bit by bit but for ties that a reciprocal rounds the other way."""

import pytest
import torch

from benthic.numerics.reference import quantise as reference
from tests.kernels.conftest import needs_hopper

kernels = pytest.importorskip("benthic.kernels.quantise", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 16), (5, 128), (130, 272), (257, 720)]


def random_matrix(*shape: int, device: str, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different size, and zeros, so that every block's scale differs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape[-1], generator=generator)
    x[..., shape[-1] // 2 :, :8] = 0
    return x.bfloat16().to(device)


def assert_same_fp8(actual: torch.Tensor, expected: torch.Tensor) -> None:
    on_gpu = actual.is_cuda
    actual, expected = actual.view(torch.uint8).int(), expected.view(torch.uint8).int()
    if on_gpu:
        assert (actual != expected).float().mean().item() <= 1e-3
    else:
        # Triton's interpreter (3.6) rounds ties up, cuts subnormals and loses the carry of a mantissa that rounds up.
        trusted = ((expected & 0x07) != 0) & ((expected & 0x78) != 0)
        actual, expected = actual[trusted], expected[trusted]
    assert (actual - expected).abs().max() <= 1


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_reference(shape, power_of_two, device):
    x = random_matrix(*shape, device=device)
    values, scales = kernels.quantise_rows(x, power_of_two)
    expected_values, expected_scales = reference.quantise_rows(x, power_of_two)
    assert torch.equal(scales, expected_scales)
    assert_same_fp8(values, expected_values)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 128), (2, 130, 272)])
def test_weights_and_their_transpose_equal_the_reference(shape, power_of_two, device):
    weight = random_matrix(*shape, device=device)
    actual = kernels.quantise_weights_with_transpose(weight, power_of_two)
    expected = reference.quantise_weights_with_transpose(weight, power_of_two)
    for values, wanted in zip(actual[::2], expected[::2], strict=True):
        assert_same_fp8(values, wanted)
    for scales, wanted in zip(actual[1::2], expected[1::2], strict=True):
        assert torch.equal(scales, wanted)
    plain = kernels.quantise_weights(weight, power_of_two)
    assert torch.equal(plain[0].view(torch.uint8), actual[0].view(torch.uint8))
    assert torch.equal(plain[1], actual[1])


@needs_hopper
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("sizes", [[300, 0, 1, 127, 129, 0], [0, 0, 5], [128, 256], [1000]])
def test_columns_of_ragged_groups_equal_the_reference(sizes, power_of_two, device):
    ends = torch.tensor(sizes).cumsum(0).int().to(device)
    x = random_matrix(sum(sizes), 208, device=device)
    values, scales = kernels.quantise_columns(x, ends, power_of_two)
    expected_values, expected_scales = reference.quantise_columns(x, ends, power_of_two)
    used = ~expected_scales[:, 0].isnan()
    assert torch.equal(scales[used], expected_scales[used])
    columns = used.repeat_interleave(128)
    assert_same_fp8(values[:, columns], expected_values[:, columns])


def test_power_of_two_scales_are_powers_of_two_and_never_overflow(device):
    x = random_matrix(64, 256, device=device)
    values, scales = kernels.quantise_rows(x, power_of_two=True)
    assert torch.equal(scales.log2(), scales.log2().round())
    assert values.float().abs().max() <= 448


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30])
def test_extreme_magnitudes_survive(magnitude, device):
    x = torch.full((2, 128), magnitude, device=device)
    values, scales = kernels.quantise_rows(x)
    restored = reference.dequantise_rows(values, scales)
    torch.testing.assert_close(restored, x, rtol=0.07, atol=0)


def test_nothing_to_quantise_is_fine(device):
    values, scales = kernels.quantise_rows(torch.zeros(0, 256, device=device))
    assert values.shape == (0, 256)
    assert scales.shape == (2, 0)


def test_a_strided_matrix_is_refused(device):
    with pytest.raises(ValueError, match="must be a contiguous matrix"):
        kernels.quantise_rows(torch.zeros(4, 256, device=device)[:, ::2])

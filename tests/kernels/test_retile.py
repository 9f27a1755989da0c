"""Rows become columns as the reference has them, and keep every value that fits."""

import pytest
import torch

from benthic.numerics.reference import quantise as plain
from benthic.numerics.reference import retile as reference
from tests.kernels.conftest import needs_hopper
from tests.kernels.test_quantise import assert_same_fp8, random_matrix

kernels = pytest.importorskip("benthic.kernels.retile", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (37, 272), (130, 4112)])
@pytest.mark.parametrize("choices", [1, 3])
def test_taken_rows_are_those_of_the_tokens(rows, columns, choices, device):
    values, scales = plain.quantise_rows(random_matrix(rows, columns, device=device), power_of_two=True)
    tokens = torch.randperm(rows * choices, generator=torch.Generator().manual_seed(0)).to(device) // choices
    taken, taken_scales = kernels.take_quantised_rows(values, scales, tokens)
    assert torch.equal(as_bytes(taken), as_bytes(values)[tokens])
    assert torch.equal(taken_scales, scales[:, tokens])


def test_taking_no_rows_is_fine(device):
    values, scales = plain.quantise_rows(torch.ones(3, 128, device=device))
    taken, taken_scales = kernels.take_quantised_rows(values, scales, torch.zeros(0, dtype=torch.int64, device=device))
    assert taken.shape == (0, 128)
    assert taken_scales.shape == (1, 0)


@needs_hopper
@pytest.mark.parametrize("taking", [False, True])
@pytest.mark.parametrize("columns", [16, 208, 720])
@pytest.mark.parametrize("sizes", [[300, 0, 1, 127, 129, 0], [0, 0, 5], [128, 256], [1000], [3] * 100])
def test_columns_of_ragged_groups_equal_the_reference(sizes, columns, taking, device):
    ends = torch.tensor(sizes).cumsum(0).int().to(device)
    rows = sum(sizes)
    tokens = None
    if taking:
        tokens = torch.randint(0, max(rows // 3, 1), (rows,), generator=torch.Generator().manual_seed(1)).to(device)
        rows = max(rows // 3, 1)
    quantised = plain.quantise_rows(random_matrix(rows, columns, device=device), power_of_two=True)
    values, scales = kernels.retile_columns(*quantised, ends, tokens)
    expected_values, expected_scales = reference.retile_columns(*quantised, ends, tokens)
    used = ~expected_scales[:, 0].isnan()
    assert torch.equal(scales[used], expected_scales[used])
    inside = used.repeat_interleave(128)
    assert_same_fp8(values[:, inside], expected_values[:, inside])


def test_retiling_keeps_what_one_scale_can_hold():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator) * 2.0 ** torch.randint(-3, 4, (256, 1), generator=generator)
    x = torch.where(x.abs() < 2**-4, 2**-4, x)  # within 2^14 of the largest
    values, scales = plain.quantise_rows(x, power_of_two=True)
    columns, column_scales = reference.retile_columns(values, scales, torch.tensor([256], dtype=torch.int32))
    restored = plain.dequantise_rows(columns[:, :256], column_scales[:2]).T
    assert torch.equal(restored, plain.dequantise_rows(values, scales))


@pytest.mark.parametrize("uneven", [0, 2])
def test_retiling_is_as_near_as_quantising_the_original_by_powers_of_two(uneven):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(uneven * torch.randn(1000, 1, generator=generator))
    x, ends = torch.randn(1000, 256, generator=generator) * sizes, torch.tensor([1000], dtype=torch.int32)

    def error(columns: tuple[torch.Tensor, torch.Tensor]) -> float:
        restored = plain.dequantise_rows(*columns)[:, :1000].T
        return float((restored - x).norm() / x.norm())

    retiled = error(reference.retile_columns(*plain.quantise_rows(x, power_of_two=True), ends))
    assert retiled == pytest.approx(error(plain.quantise_columns(x, ends, power_of_two=True)), rel=1e-3)

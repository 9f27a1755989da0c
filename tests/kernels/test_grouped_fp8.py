"""The grouped FP8 matmuls against float32 on the same quantised operands, with poisoned results."""

import pytest
import torch

from benthic.numerics.reference import grouped_matmul_fp8 as matmul_reference
from benthic.numerics.reference import grouped_weight_gradient_fp8 as gradient_reference
from benthic.numerics.reference import quantise as reference
from tests.kernels.conftest import needs_hopper

pytestmark = [needs_hopper, pytest.mark.usefixtures("poisoned")]
RAGGED = [300, 0, 1, 127, 129, 640, 0]
CASES = [(RAGGED, 512, 640), ([0, 0, 0, 5], 256, 256), ([1000, 77, 2048, 3], 768, 1024), ([256, 130], 384, 208)]
SMALL = [
    ([200, 0, 5], 16, 16),
    ([1], 16, 64),
    ([5, 200], 64, 64),
    ([129], 128, 128),
    ([3], 48, 192),
    ([9, 130], 128, 256),
]
"""One tile or less: comparisons of its end with the group's are between equals (docs/kernels-fp8.md, traps)."""


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = torch.rand(shape[-2], 1, generator=generator, device="cuda") * 4
    return torch.randn(shape, generator=generator, device="cuda") * size


def ends_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int().cuda()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize(("sizes", "columns", "depth"), [*CASES, *SMALL])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_forward_product_of_ragged_groups_equals_float32(sizes, columns, depth, seed):
    from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8

    values, scales = reference.quantise_rows(random(sum(sizes), depth, seed=seed))
    weight, weight_scales = reference.quantise_weights(random(len(sizes), columns, depth, seed=seed + 2))
    arguments = values, scales, weight, weight_scales, ends_of(sizes)
    actual = grouped_matmul_fp8(*arguments)
    expected = matmul_reference.grouped_matmul_fp8(*arguments)
    assert relative_error(actual, expected) < 1e-3
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "columns", "rows"), [*CASES, *SMALL, *[(RAGGED, 1600, rows) for rows in (1152, 1088, 1136)]]
)
def test_the_weight_gradient_of_ragged_groups_equals_float32(sizes, columns, rows, dtype):
    from benthic.kernels.grouped_weight_gradient_fp8 import grouped_weight_gradient_fp8

    ends = ends_of(sizes)
    gradient = reference.quantise_columns(random(sum(sizes), rows, seed=0), ends)
    inputs = reference.quantise_columns(random(sum(sizes), columns, seed=1), ends)
    actual = grouped_weight_gradient_fp8(*gradient, *inputs, ends, dtype)
    expected = gradient_reference.grouped_weight_gradient_fp8(*gradient, *inputs, ends, dtype)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 1e-3
    empty = torch.tensor(sizes).cuda() == 0
    assert not actual[empty].any()


def test_other_shapes_compile_nothing_anew():
    from benthic.kernels import grouped_matmul_fp8, grouped_weight_gradient_fp8

    compiled = []
    for sizes, columns, depth in [*CASES, *SMALL]:
        ends = ends_of(sizes)
        values, scales = reference.quantise_rows(random(sum(sizes), depth, seed=0))
        weight, weight_scales = reference.quantise_weights(random(len(sizes), columns, depth, seed=1))
        grouped_matmul_fp8.grouped_matmul_fp8(values, scales, weight, weight_scales, ends)
        gradient = reference.quantise_columns(random(sum(sizes), depth, seed=0), ends)
        inputs = reference.quantise_columns(random(sum(sizes), columns, seed=1), ends)
        for dtype in (torch.float32, torch.bfloat16):
            grouped_weight_gradient_fp8.grouped_weight_gradient_fp8(*gradient, *inputs, ends, dtype)
        kernels = grouped_matmul_fp8._kernel, grouped_weight_gradient_fp8._kernel
        compiled.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(count == compiled[0] for count in compiled)


def test_the_same_call_gives_the_same_bits():
    from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8

    values, scales = reference.quantise_rows(random(sum(RAGGED), 1024, seed=0))
    weight, weight_scales = reference.quantise_weights(random(len(RAGGED), 768, 1024, seed=1))
    first, *others = [grouped_matmul_fp8(values, scales, weight, weight_scales, ends_of(RAGGED)) for _ in range(5)]
    assert all(torch.equal(first, other) for other in others)


def test_rows_past_the_last_group_are_not_written():
    from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8

    values, scales = reference.quantise_rows(random(200, 256, seed=0))
    weight, weight_scales = reference.quantise_weights(random(2, 256, 256, seed=1))
    result = grouped_matmul_fp8(values, scales, weight, weight_scales, ends_of([70, 30]))
    assert not result[:100].isnan().any()
    assert result[100:].isnan().all()


def test_a_call_can_be_captured_in_a_graph_and_follows_new_offsets():
    from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8

    values, scales = reference.quantise_rows(random(500, 512, seed=0))
    weight, weight_scales = reference.quantise_weights(random(3, 256, 512, seed=1))
    ends = ends_of([100, 200, 200])
    grouped_matmul_fp8(values, scales, weight, weight_scales, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = grouped_matmul_fp8(values, scales, weight, weight_scales, ends)
    ends.copy_(ends_of([0, 499, 1]))
    graph.replay()
    expected = matmul_reference.grouped_matmul_fp8(values, scales, weight, weight_scales, ends)
    assert relative_error(result, expected) < 1e-3


def test_wrong_operands_are_named():
    from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8

    values, scales = reference.quantise_rows(random(64, 256, seed=0))
    weight, weight_scales = reference.quantise_weights(random(2, 256, 256, seed=1))
    with pytest.raises(ValueError, match=r"scales must be contiguous torch.float32 \[2, 64\]"):
        grouped_matmul_fp8(values, scales.T, weight, weight_scales, ends_of([32, 32]))
    with pytest.raises(ValueError, match=r"ends must be contiguous torch.int32 \[2\]"):
        grouped_matmul_fp8(values, scales, weight, weight_scales, ends_of([32, 32]).long())

"""The counting sort equals torch's stable sort, and rows come and go as plain indexing has them."""

import pytest
import torch

from benthic.numerics.reference import permutation as reference

kernels = pytest.importorskip("benthic.kernels.permutation", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")


def picks(tokens: int, chosen: int, experts: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(chosen).indices.to(device)


def noise(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts"), [(1, 1, 1), (7, 3, 5), (64, 1, 2), (65, 6, 64), (50, 8, 256), (333, 3, 7)]
)
def test_the_sort_equals_a_stable_sort(tokens, chosen, experts, device):
    chosen_experts = picks(tokens, chosen, experts, device)
    for ours, theirs in zip(
        kernels.sort_by_expert(chosen_experts, experts), reference.sort_by_expert(chosen_experts, experts), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(1, 1, 1), (7, 3, 5), (65, 6, 64), (333, 3, 7)])
def test_choices_of_none_are_passed_over(tokens, chosen, experts, device):
    picked = picks(tokens, chosen, experts, device)
    picked[noise(tokens, chosen, device=device) < 0.3] = -1
    count = int((picked >= 0).sum())
    ours, theirs = kernels.sort_by_expert(picked, experts, count), reference.sort_by_expert(picked, experts, count)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    places = theirs[1]
    x = noise(tokens, 13, device=device)
    rows = kernels.take_rows(x, places, count)
    assert torch.equal(rows, reference.take_rows(x, places, count))
    torch.testing.assert_close(kernels.sum_choices(rows, places), reference.sum_choices(rows, places))


def test_all_tokens_on_one_expert_stay_in_order(device):
    tokens, places, ends = kernels.sort_by_expert(torch.full((300, 1), 2, device=device), 4)
    assert tokens.tolist() == places.flatten().tolist() == list(range(300))
    assert ends.tolist() == [0, 0, 300, 300]


def test_no_tokens_are_sorted_into_no_rows(device):
    tokens, places, ends = kernels.sort_by_expert(torch.zeros(0, 6, dtype=torch.int64, device=device), 5)
    assert (tokens.shape, places.shape, ends.tolist()) == ((0,), (0, 6), [0] * 5)
    rows = kernels.take_rows(torch.zeros(0, 8, device=device), places)
    assert rows.shape == (0, 8)
    assert kernels.sum_choices(rows, places).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "chosen", "width"), [(1, 1, 1), (5, 3, 13), (9, 6, 2048), (3, 16, 1100)])
def test_rows_are_taken_and_summed_as_the_reference_does(tokens, chosen, width, dtype, device):
    places = reference.sort_by_expert(picks(tokens, chosen, 2 * chosen, device), 2 * chosen)[1]
    x, residual = noise(tokens, width, device=device, dtype=dtype), noise(tokens, width, device=device, dtype=dtype)
    rows = kernels.take_rows(x, places)
    assert torch.equal(rows, reference.take_rows(x, places))
    rows = rows * noise(len(rows), 1, device=device, dtype=dtype)
    for added in (None, residual):
        torch.testing.assert_close(
            kernels.sum_choices(rows, places, added), reference.sum_choices(rows, places, added), rtol=1e-2, atol=1e-5
        )


def test_the_sum_is_in_float32_and_in_the_order_of_choices(device):
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    places = torch.tensor([[0, 2, 1, 3], [0, 1, 2, 3]], device=device)
    assert kernels.sum_choices(rows, places).flatten().tolist() == [2.0, 1.0]


def test_a_strided_gradient_is_taken_as_well(device):
    places = torch.tensor([[1], [0]], device=device)
    x = torch.ones(1, 1, device=device).expand(2, 5)
    assert torch.equal(kernels.take_rows(x, places), torch.ones(2, 5, device=device))


@pytest.mark.parametrize("sizes", [[0, 3, 0, 2], [0, 0], [1, 1]])
def test_only_empty_experts_gradients_are_cleared(sizes, device):
    from benthic.kernels.empty_experts import clear_empty_experts

    gradient = torch.full((len(sizes), 70, 61), torch.nan, device=device)
    clear_empty_experts(gradient, torch.tensor(sizes).cumsum(0).int().to(device))
    for size, block in zip(sizes, gradient, strict=True):
        assert block.isnan().all() if size else not block.any()

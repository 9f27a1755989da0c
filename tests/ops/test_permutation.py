"""Sorting by expert on any machine: where rows lie, and that taking and summing are each other's transpose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.ops.permutation import by_choice, by_row, first_rows, sort_by_expert, sum_choices, take_rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(6, 9), st.integers(0, 1000))
def test_rows_lie_by_expert_and_within_one_by_token(tokens, chosen, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=generator).topk(chosen).indices
    permutation = sort_by_expert(experts, num_experts)
    order = sorted((int(expert), token) for token, row in enumerate(experts) for expert in row)
    assert permutation.tokens.tolist() == [token for _, token in order]
    assert permutation.ends.tolist() == [sum(expert <= end for expert, _ in order) for end in range(num_experts)]
    flat = experts.flatten()
    assert torch.equal(
        torch.tensor([e for e, _ in order]), torch.empty_like(flat).scatter_(0, permutation.places.flatten(), flat)
    )

    x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).float().requires_grad_()
    rows = take_rows(x, permutation)
    assert torch.equal(rows, x[permutation.tokens])
    other = torch.randn(rows.shape, generator=generator).requires_grad_()
    summed = sum_choices(other, permutation)
    torch.testing.assert_close((rows * other).sum(), (x * summed).sum(), rtol=1e-4, atol=1e-4)
    (grad_x,) = torch.autograd.grad(rows, x, other.detach())
    assert torch.equal(grad_x, summed)
    (grad_rows,) = torch.autograd.grad(summed, other, x.detach())
    assert torch.equal(grad_rows, rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.floats(0, 1), st.integers(0, 1000))
def test_choices_of_none_have_no_row(tokens, chosen, share, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 7, generator=generator).topk(chosen).indices
    experts[torch.rand(experts.shape, generator=generator) < share] = -1
    named = experts >= 0
    count = int(named.sum())
    permutation = sort_by_expert(experts, 7, count)
    cut = first_rows(sort_by_expert(experts, 7), count)
    assert all(torch.equal(*pair) for pair in zip(cut, permutation, strict=True))
    order = sorted((int(expert), token) for token, row in enumerate(experts) for expert in row if expert >= 0)
    assert permutation.tokens.tolist() == [token for _, token in order]
    assert permutation.ends.tolist() == [sum(expert <= end for expert, _ in order) for end in range(7)]
    assert torch.equal(permutation.places >= 0, named)
    assert by_row(experts.float(), permutation).tolist() == [expert for expert, _ in order]
    numbers = torch.rand(count, generator=generator)
    assert torch.equal(by_row(by_choice(numbers, permutation.places), permutation), numbers)
    assert not by_choice(numbers, permutation.places)[~named].any()

    x = torch.randn(tokens, 3, generator=generator).requires_grad_()
    rows = take_rows(x, permutation)
    assert torch.equal(rows, x[permutation.tokens])
    other = torch.randn(rows.shape, generator=generator).requires_grad_()
    summed = sum_choices(other, permutation)
    expected = torch.zeros(tokens, 3).index_add(0, permutation.tokens, other.detach())
    torch.testing.assert_close(summed.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.autograd.grad(rows, x, other.detach())[0], summed)
    assert torch.equal(torch.autograd.grad(summed, other, x.detach())[0], rows)


def test_a_sum_of_bfloat16_rows_is_made_in_float32_and_rounded_once():
    permutation = sort_by_expert(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    assert sum_choices(rows, permutation).item() == 1 + 2.0**-7
    residual = torch.full((1, 1), 2.0**-7, dtype=torch.bfloat16)
    assert sum_choices(rows, permutation, residual).item() == 1 + 2.0**-6

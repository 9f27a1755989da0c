"""Absorbed attention over pages against plain torch, with poison wherever nothing may be read."""

import pytest
import torch

from benthic.numerics.reference.paged_latent_attention import absorbed_paged_attention as reference

kernels = pytest.importorskip("benthic.kernels.paged_latent_attention", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
# Triton's interpreter (3.6) multiplies bfloat16 by its bits.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def paged(counts, lengths, heads, rank, turning, block, device, padding=0, seed=0):
    """Arguments of a call: pages in random order, NaN in every row of the pool that holds no key."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block) for length in lengths]
    places = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    pool = torch.full((len(places), block, rank + turning), torch.nan)
    tables = torch.full((len(lengths), max([*needed, 1])), 2**30, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        for page in range(needed[sequence]):
            place = places.pop()
            tables[sequence, page] = place
            rows = min(block, length - page * block)
            pool[place, :rows] = torch.randn(rows, rank + turning, generator=generator)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    query = torch.randn(sum(counts) + padding, heads, rank + turning, generator=generator)
    tensors = query.to(DTYPE), pool.to(DTYPE), tables, starts, torch.tensor(lengths, dtype=torch.int32)
    return *(tensor.to(device) for tensor in tensors), (rank + turning) ** -0.5, rank


def expected_of(query, pool, tables, *rest):
    return reference(query.cpu(), pool.cpu(), tables.cpu().clamp(max=len(pool) - 1), *(
        x.cpu() if isinstance(x, torch.Tensor) else x for x in rest
    ))  # fmt: skip


def assert_agree(actual, expected):
    torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("heads", [1, 16, 24, 128])
def test_one_row_a_sequence_over_odd_lengths_equals_the_reference(heads, block, device):
    arguments = paged([1] * 4, [1, 77, block, 3 * block + 1], heads, 64, 16, block, device)
    assert_agree(kernels.in_triton(*arguments), expected_of(*arguments))


@pytest.mark.parametrize("heads", [4, 16, 40])
def test_drafts_and_prefill_rows_see_no_key_behind_them(heads, device):
    arguments = paged([2, 4, 1, 21, 3], [2, 40, 33, 50, 3], heads, 32, 16, 16, device)
    assert_agree(kernels.in_triton(*arguments), expected_of(*arguments))


@pytest.mark.parametrize("first", [1, 3, 25])
def test_keys_before_the_first_are_hidden(first, device):
    arguments = paged([1, 2, 5], [20, 70, 5], 16, 32, 16, 16, device)
    assert_agree(kernels.in_triton(*arguments, first), expected_of(*arguments, first))


def test_widths_that_are_no_power_of_two(device):
    arguments = paged([1, 3], [20, 45], 6, 48, 24, 16, device)
    assert_agree(kernels.in_triton(*arguments), expected_of(*arguments))


@pytest.mark.parametrize("shares", [1, 3, 40])
def test_any_number_of_shares_gives_the_same(shares, device, monkeypatch):
    monkeypatch.setattr(kernels, "shares_of_context", lambda *_: shares)
    arguments = paged([1, 2, 2], [400, 90, 2], 16, 32, 16, 16, device)
    assert_agree(kernels.in_triton(*arguments), expected_of(*arguments))


def test_sequences_without_rows_and_rows_without_keys_are_zeros(device):
    arguments = paged([0, 1, 0, 2], [30, 20, 0, 1], 16, 32, 16, 16, device, padding=5)
    actual = kernels.in_triton(*arguments)
    assert_agree(actual, expected_of(*arguments))
    assert not actual[1].any()  # of two rows over one key, the first sees none
    assert not actual[3:].any()


def test_nothing_to_do_is_fine(device):
    arguments = paged([0], [0], 16, 32, 16, 16, device)
    assert kernels.in_triton(*arguments).shape == (0, 16, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes minutes at these widths")
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_published_widths(heads, device):
    arguments = paged([1, 1, 2], [1, 700, 65], heads, 512, 64, 64, device)
    assert_agree(kernels.in_triton(*arguments), expected_of(*arguments))


def test_where_there_is_no_kernel_of_its_own_triton_runs(device):
    arguments = paged([1, 2], [20, 45], 6, 48, 24, 16, device)
    assert torch.equal(kernels.absorbed_paged_attention(*arguments), kernels.in_triton(*arguments))


def test_wrong_operands_are_named(device):
    query, pool, tables, *rest = paged([1], [20], 16, 32, 16, 16, device)
    with pytest.raises(ValueError, match=r"tables must be torch.int32, not torch.int64"):
        kernels.in_triton(query, pool, tables.long(), *rest)
    with pytest.raises(ValueError, match=r"a row of the pool holds 40 numbers, a query 48"):
        kernels.in_triton(query, pool[..., :40].contiguous(), tables, *rest)

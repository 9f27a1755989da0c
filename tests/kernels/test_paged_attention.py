"""Attention over pages of keys and values against plain torch, with poison wherever nothing may be read."""

import pytest
import torch

from benthic.numerics.reference.paged_attention import paged_attention as reference
from tests.kernels.test_paged_latent_attention import assert_agree, paged

kernels = pytest.importorskip("benthic.kernels.paged_attention", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")


def arguments_of(counts, lengths, heads, key_heads, width, value_width, block, device, padding=0):
    row = key_heads * (width + value_width)
    query, *rest, _, _ = paged(counts, lengths, heads, 0, row, block, device, padding)
    return query[..., :width].contiguous(), *rest, width**-0.5, key_heads


def expected_of(query, pool, tables, *rest):
    return reference(query.cpu(), pool.cpu(), tables.cpu().clamp(max=len(pool) - 1), *(
        x.cpu() if isinstance(x, torch.Tensor) else x for x in rest
    ))  # fmt: skip


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (8, 8), (12, 4), (40, 1)])
def test_one_row_a_sequence_over_odd_lengths_equals_the_reference(heads, key_heads, block, device):
    arguments = arguments_of([1] * 3, [1, 77, 3 * block + 1], heads, key_heads, 32, 32, block, device)
    assert_agree(kernels.paged_attention(*arguments), expected_of(*arguments))


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (24, 2)])
def test_drafts_and_prefill_rows_of_any_width_see_no_key_behind_them(heads, key_heads, first, device):
    arguments = arguments_of([2, 4, 1, 21, 0], [2, 40, 33, 50, 9], heads, key_heads, 24, 40, 16, device, padding=2)
    assert_agree(kernels.paged_attention(*arguments, first), expected_of(*arguments, first))


@pytest.mark.parametrize("shares", [1, 3, 20])
def test_any_number_of_shares_gives_the_same(shares, device, monkeypatch):
    monkeypatch.setattr(kernels, "shares_of_context", lambda *_: shares)
    arguments = arguments_of([1, 2, 2], [400, 90, 2], 8, 2, 32, 16, 16, device)
    assert_agree(kernels.paged_attention(*arguments), expected_of(*arguments))


def test_heads_that_do_not_fit_are_named(device):
    query, pool, *rest, _ = arguments_of([1], [20], 8, 2, 32, 16, 16, device)
    with pytest.raises(ValueError, match="8 query heads of 32 and rows of 96 do not fit 3 key heads"):
        kernels.paged_attention(query, pool, *rest, 3)

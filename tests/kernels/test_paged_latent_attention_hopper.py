"""The Gluon kernel for Hopper against plain torch, with poison behind every sequence's end."""

import pytest
import torch

from tests.kernels.conftest import needs_hopper
from tests.kernels.test_paged_latent_attention import assert_agree, expected_of, paged

kernels = pytest.importorskip(
    "benthic.kernels.paged_latent_attention_hopper", reason="triton comes with CUDA builds of torch"
)
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_right(arguments, first=0):
    assert_agree(kernels.absorbed_paged_attention(*arguments, first), expected_of(*arguments, first))


@needs_hopper
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("heads", [1, 16, 40, 64, 128])
def test_one_row_a_sequence_over_odd_lengths(heads, block):
    assert_right(paged([1] * 5, [1, 77, 64, 193, 1000], heads, 512, 64, block, "cuda"))


@needs_hopper
@pytest.mark.parametrize("first", [0, 1, 70])
@pytest.mark.parametrize("heads", [16, 40, 128])
def test_drafts_and_prefill_rows_see_no_key_behind_them(heads, first):
    assert_right(paged([2, 4, 1, 70, 3], [2, 130, 33, 300, 3], heads, 512, 64, 64, "cuda"), first)


@needs_hopper
@pytest.mark.parametrize("shares", [1, 2, 7, 100])
def test_any_number_of_shares(shares, monkeypatch):
    monkeypatch.setattr(kernels, "shares_of_context", lambda *_: shares)
    assert_right(paged([1, 2, 2], [4000, 90, 2], 16, 512, 64, 64, "cuda"))


@needs_hopper
def test_sequences_without_rows_and_rows_without_keys_are_zeros():
    arguments = paged([0, 1, 0, 2], [30, 20, 0, 1], 16, 512, 64, 64, "cuda", padding=5)
    actual = kernels.absorbed_paged_attention(*arguments)
    assert_agree(actual, expected_of(*arguments))
    assert not actual[3:].any()


@needs_hopper
@pytest.mark.parametrize("batch", [130, 300])
def test_many_sequences_of_every_length(batch):
    assert_right(paged([1] * batch, [1 + 7 * i % 513 for i in range(batch)], 16, 512, 64, 64, "cuda"))


@needs_hopper
def test_a_call_can_be_captured_and_follows_new_lengths():
    arguments = paged([1, 1], [500, 300], 16, 512, 64, 64, "cuda")
    kernels.absorbed_paged_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = kernels.absorbed_paged_attention(*arguments)
    arguments[4].copy_(torch.tensor([3, 299]))
    graph.replay()
    assert_agree(actual, expected_of(*arguments))


@needs_hopper
def test_the_same_call_gives_the_same_bits():
    arguments = paged([1, 2], [2000, 90], 128, 512, 64, 64, "cuda")
    results = [kernels.absorbed_paged_attention(*arguments) for _ in range(20)]
    assert all(torch.equal(results[0], result) for result in results)


def test_other_widths_and_devices_are_refused(device):
    arguments = paged([1], [20], 4, 32, 16, 16, device)
    with pytest.raises(
        ValueError, match=r"this kernel is for bfloat16 rows of 512 \+ 64 in blocks of a multiple of 64"
    ):
        kernels.absorbed_paged_attention(*arguments)

"""Tokens and log-probabilities against plain torch, for vocabularies that fill pieces and that do not."""

import pytest
import torch

from benthic.numerics.reference import likeliest as reference

kernels = pytest.importorskip("benthic.kernels.likeliest", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")


def noise(rows, vocabulary, device, dtype=torch.float32):
    return (5 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5000), (3, 100), (2, 2048), (17, 4097)])
def test_tokens_and_log_probabilities_are_those_of_torch(rows, vocabulary, dtype, device):
    logits = noise(rows, vocabulary, device, dtype)
    tokens, told = kernels.likeliest(logits)
    expected_tokens, expected = reference.likeliest(logits)
    assert torch.equal(logits.gather(1, tokens[:, None]), logits.gather(1, expected_tokens[:, None]))
    assert torch.equal(told[0], tokens.double())
    assert torch.equal(told[2], expected[2])
    assert (told[1] - expected[1]).abs().max() < 1e-5


def test_of_equals_the_first_is_taken_in_a_piece_and_between_pieces(device):
    logits = torch.zeros(2, 6000, device=device)
    logits[1, 4500:] = 1
    assert kernels.likeliest(logits)[0].tolist() == [0, 4500]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_told_and_gives_a_token_that_is_there(broken, device):
    logits = noise(3, 5001, device)
    logits[0, 4999] = broken
    logits[2] = broken
    tokens, told = kernels.likeliest(logits)
    assert told[1].isfinite().tolist() == [False, True, False]
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 5001


def test_tokens_that_cannot_be_are_no_fault(device):
    logits = noise(2, 5001, device)
    logits[:, 1000:] = -float("inf")
    tokens, told = kernels.likeliest(logits)
    assert torch.equal(tokens, logits.argmax(-1))
    assert (told[1] - reference.likeliest(logits)[1][1]).abs().max() < 1e-5


def test_rows_of_a_wider_matrix(device):
    logits = noise(4, 600, device)
    assert torch.equal(kernels.likeliest(logits[:, :500])[0], logits[:, :500].argmax(-1))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.likeliest(logits.t())

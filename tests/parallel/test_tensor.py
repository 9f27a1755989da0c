"""What tensor ranks give each other, against one process that has everything."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benthic.ops import linear_cross_entropy
from benthic.parallel.collectives import gathered, reduced
from benthic.parallel.vocabulary import VocabularyEmbedding, all_words, shared_cross_entropy
from tests.parallel.processes import on_ranks

pytestmark = pytest.mark.slow

SEQUENCES, POSITIONS, WIDTH, WORDS = 2, 6, 5, 14


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def piece(x: torch.Tensor, dimension: int) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), dimension)[dist.get_rank()].clone().requires_grad_()


def check_gathers_and_sums() -> None:
    group = dist.group.WORLD
    rank, whole = dist.get_rank(), drawn(4, 6, 2, seed=1)
    for dimension in (0, 1, -2):
        mine = piece(whole, dimension)
        found = gathered(mine, group, dimension)
        assert torch.equal(found, whole)
        # Each rank weighs what it gathered by other numbers: the gradient of a piece is the sum of all.
        factors = [drawn(4, 6, 2, seed=10 + other) for other in range(group.size())]
        (found * factors[rank]).sum().backward()
        torch.testing.assert_close(mine.grad, sum(factors).chunk(group.size(), dimension)[rank])
        part = factors[rank].clone().requires_grad_()
        found = reduced(part, group, dimension)
        torch.testing.assert_close(found, sum(factors).chunk(group.size(), dimension)[rank])
        (found * piece(whole, dimension)).sum().backward()
        assert torch.equal(part.grad, whole)


def check_loss() -> None:
    group = dist.group.WORLD
    whole, words = drawn(SEQUENCES, POSITIONS, WIDTH, seed=2), drawn(WORDS, WIDTH, seed=3)
    targets = torch.randint(WORDS, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(4))
    targets[0, 1] = targets[1, -1] = -100
    hidden, weight = whole.clone().requires_grad_(), words.clone().requires_grad_()
    expected, _ = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), 7)
    (3 * expected).backward()
    mine, own = piece(whole, 1), piece(words, 0)
    loss = shared_cross_entropy(mine, own, targets, 7, group)
    (3 * loss).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(mine.grad, piece(hidden.grad, 1).detach())
    torch.testing.assert_close(own.grad, piece(weight.grad, 0).detach())


def check_embedding_and_logits() -> None:
    group = dist.group.WORLD
    words = drawn(WORDS, WIDTH, seed=3)
    ids = torch.randint(WORDS, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(5))
    embedding = VocabularyEmbedding(nn.Parameter(piece(words, 0).detach()), group)
    expected = F.embedding(ids, words)
    assert torch.equal(embedding(ids), piece(expected, 1))
    embedding(ids).sum().backward()
    # Every rank's pieces are summed in the loss, so each word's gradient counts its places in all positions.
    places = ids.flatten().bincount(minlength=WORDS).chunk(group.size())[dist.get_rank()]
    assert torch.equal(embedding.weight.grad, places[:, None].expand(-1, WIDTH).float())
    with torch.no_grad():
        assert torch.equal(embedding(ids), expected)
        logits = all_words(lambda hidden: hidden @ embedding.weight.T, group)
        torch.testing.assert_close(logits(expected), expected @ words.T)
        torch.testing.assert_close(logits(expected[0, 0]), expected[0, 0] @ words.T)


def check_all() -> None:
    dist.init_process_group("gloo")
    check_gathers_and_sums()
    check_loss()
    check_embedding_and_logits()
    dist.destroy_process_group()


def test_gathers_sums_embedding_logits_and_loss_are_those_of_one_process():
    on_ranks(2, check_all)

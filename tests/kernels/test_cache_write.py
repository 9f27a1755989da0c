"""Rows of the cache against plain torch; rows that nobody writes keep what they held."""

import pytest
import torch

from benthic.numerics.reference import cache_write as reference

kernels = pytest.importorskip("benthic.kernels.cache_write", reason="triton comes with CUDA builds of torch")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def random(*shape, seed, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE).to(device)


def places(tokens, pairs, device):
    """Rotations of 50 positions, a position for each token, and slots in random order, one of them skipped."""
    angles = torch.rand(50, pairs, generator=torch.Generator().manual_seed(1)) * 6
    rotations = torch.polar(torch.ones_like(angles), angles)
    positions = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(2))
    slots = torch.randperm(4 * 16, generator=torch.Generator().manual_seed(3))[:tokens].int()
    slots[tokens // 2] = -1
    return rotations.to(device), positions.to(device), slots.to(device)


def assert_agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rank", "turning"), [(512, 64), (48, 24)])
def test_latents_are_normalised_and_keys_turned(rank, turning, interleaved, device):
    projected = random(9, 16 + rank + turning, seed=0, device=device)[:, 16:]  # a part of a wider projection
    weight = random(rank, seed=5, device=device)
    rotations, positions, slots = places(9, turning // 2, device)
    pools = [torch.full((4, 16, rank + turning), 7.0, dtype=DTYPE, device=device) for _ in range(2)]
    for write, pool in zip((kernels.write_latents, reference.write_latents), pools, strict=True):
        write(projected, weight, 1e-6, rotations, positions, slots, pool, interleaved)
    assert_agree(*pools)
    assert (pools[0] == 7.0).all(2).sum() == 4 * 16 - 8


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [1, 6, 16])
def test_queries_turn_in_the_same_launch(heads, interleaved, device):
    projected, weight = random(5, 64 + 16, seed=0, device=device), random(64, seed=5, device=device)
    query = random(5, heads, 24 + 16, seed=6, device=device)
    results = []
    for write in (kernels.turn_and_write_latents, reference.turn_and_write_latents):
        pool = torch.zeros(4, 16, 80, dtype=DTYPE, device=device)
        absorbed = torch.full((5, heads, 80), 3.0, dtype=DTYPE, device=device)
        write(query, projected, weight, 1e-6, *places(5, 8, device), pool, absorbed, interleaved)
        results.append((pool, absorbed))
    for actual, expected in zip(*results, strict=True):
        assert_agree(actual, expected)
    assert (results[0][1][..., :64] == 3.0).all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (12, 3), (8, 1)])
def test_keys_and_values_of_plain_heads(heads, key_heads, interleaved, device):
    query, key = random(7, heads, 32, seed=0, device=device), random(7, key_heads, 32, seed=1, device=device)
    value = random(7, key_heads, 48, seed=2, device=device)
    results = []
    for write in (kernels.turn_and_write_keys, reference.turn_and_write_keys):
        pool = torch.full((4, 16, key_heads * 80), 7.0, dtype=DTYPE, device=device)
        turned = write(query, key, value, *places(7, 16, device), pool, interleaved)
        results.append((pool, turned))
    for actual, expected in zip(*results, strict=True):
        assert_agree(actual, expected)


def test_widths_that_do_not_fit_are_named(device):
    projected, weight = random(5, 80, seed=0, device=device), random(60, seed=5, device=device)
    pool = torch.zeros(4, 16, 80, dtype=DTYPE, device=device)
    with pytest.raises(ValueError, match="60 weights and 8 rotations need 76"):
        kernels.write_latents(projected, weight, 1e-6, *places(5, 8, device), pool, True)

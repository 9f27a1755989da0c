"""Attention over e4m3 latents, and the rows that are written for it, against plain torch."""

import pytest
import torch

from benthic.numerics.reference import paged_latent_attention_fp8 as reference
from benthic.numerics.reference.paged_latent_attention import absorbed_paged_attention
from tests.kernels.test_cache_write import places, random
from tests.kernels.test_paged_latent_attention import DTYPE, assert_agree, paged

kernels = pytest.importorskip(
    "benthic.kernels.paged_latent_attention_fp8", reason="triton comes with CUDA builds of torch"
)
pytestmark = pytest.mark.usefixtures("poisoned")
POISON = 0xFF
"""NaN in e4m3, float16, bfloat16 and float32."""


def packed(counts, lengths, heads, rank, turning, block, device, padding=0):
    query, pool, tables, *rest = paged(counts, lengths, heads, rank, turning, block, "cpu", padding)
    # The interpreter (3.6) cuts subnormal e4m3 numbers, so there are none.
    pool[..., :rank] = pool[..., :rank].sign() * pool[..., :rank].abs().clamp(min=0.2)
    unused = pool[..., :1].isnan()
    small = torch.where(unused, POISON, reference.pack(torch.where(unused, 1, pool), rank))
    return pool, (query.to(device), small.to(device), tables.to(device), *(
        x.to(device) if isinstance(x, torch.Tensor) else x for x in rest
    ))  # fmt: skip


def expected_of(query, pool, tables, *rest):
    return reference.absorbed_paged_attention_fp8(query.cpu(), pool.cpu(), tables.cpu().clamp(max=len(pool) - 1), *(
        x.cpu() if isinstance(x, torch.Tensor) else x for x in rest
    ))  # fmt: skip


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("heads", [1, 16, 40, 128])
def test_attention_over_odd_lengths_equals_the_reference(heads, block, device):
    _, arguments = packed([1, 2, 0, 1], [1, 77, 9, 3 * block + 1], heads, 64, 16, block, device, padding=2)
    assert_agree(kernels.absorbed_paged_attention_fp8(*arguments), expected_of(*arguments))


@pytest.mark.parametrize("shares", [1, 3, 12])
def test_any_number_of_shares_and_keys_that_are_hidden(shares, device, monkeypatch):
    monkeypatch.setattr(kernels, "shares_of_context", lambda *_, **__: shares)
    _, arguments = packed([1, 2], [400, 90], 16, 32, 16, 16, device)
    assert_agree(kernels.absorbed_paged_attention_fp8(*arguments, 3), expected_of(*arguments, 3))


def test_packing_costs_little_precision():
    pool, (query, small, tables, *rest) = packed([1, 1], [100, 64], 16, 64, 16, 16, "cpu")
    tables = tables.clamp(max=len(pool) - 1)
    exact = absorbed_paged_attention(query, pool, tables, *rest).float()
    found = reference.absorbed_paged_attention_fp8(query, small, tables, *rest).float()
    assert 0 < (found - exact).norm() < 0.04 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter rounds to e4m3 in its own way")
@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_are_written_as_the_reference_packs_them(interleaved, device):
    projected, weight = random(9, 512 + 64, seed=0, device=device), random(512, seed=5, device=device)
    pools = [torch.full((4, 16, 656), 7, dtype=torch.uint8, device=device) for _ in range(2)]
    for write, pool in zip((kernels.write_latents_fp8, reference.write_latents_fp8), pools, strict=True):
        write(projected, weight, 1e-6, *places(9, 32, device), pool, interleaved)
    assert (pools[0] == 7).all(2).sum() == 4 * 16 - 8
    used = (pools[0] != 7).any(2)
    actual, expected = (reference.unpack(pool[used], 512, DTYPE) for pool in pools)
    torch.testing.assert_close(actual, expected, rtol=0.07, atol=1e-2)
    assert (actual - expected).norm() < 5e-3 * expected.norm()


def test_written_rows_give_back_what_was_projected(device):
    projected, weight = random(9, 64 + 16, seed=0, device=device), random(64, seed=5, device=device)
    pool = torch.full((4, 16, 64 + 32 + 16), 7, dtype=torch.uint8, device=device)
    expected = pool.clone()
    arguments = projected, weight, 1e-6, *places(9, 8, device)
    kernels.write_latents_fp8(*arguments, pool, True)
    reference.write_latents_fp8(*arguments, expected, True)
    used = (pool != 7).any(2)
    assert used.sum() == 8
    actual, expected = (reference.unpack(rows[used], 64, DTYPE) for rows in (pool, expected))
    assert (actual - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(actual[:, 64:], expected[:, 64:], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_turn_as_the_reference_turns_them(interleaved, device):
    projected, weight = random(9, 64 + 16, seed=0, device=device), random(64, seed=5, device=device)
    query = random(9, 6, 24 + 16, seed=6, device=device)
    pools = [torch.full((4, 16, 64 + 32 + 16), 7, dtype=torch.uint8, device=device) for _ in range(2)]
    absorbed = [torch.full((9, 6, 64 + 16), 7.0, dtype=DTYPE, device=device) for _ in range(2)]
    for module, pool, turned in zip((kernels, reference), pools, absorbed, strict=True):
        arguments = projected, weight, 1e-6, *places(9, 8, device), pool, turned, interleaved
        module.turn_and_write_latents_fp8(query, *arguments)
    torch.testing.assert_close(*absorbed, rtol=1e-2, atol=2e-3)
    assert (absorbed[0][..., :64] == 7).all()
    assert ((pools[0] == 7).all(2) == (pools[1] == 7).all(2)).all()


def test_a_pool_of_another_row_is_named(device):
    _, (query, pool, *rest) = packed([1], [20], 4, 32, 16, 16, device)
    with pytest.raises(
        ValueError, match="a row of the pool is 64 bytes; latents of 32 and 16 rotated channels need 80"
    ):
        kernels.absorbed_paged_attention_fp8(query, pool[..., :64].contiguous(), *rest)

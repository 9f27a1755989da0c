"""Rows of a paged cache hold what the model's own operations make of them."""

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference import paged_latent_attention_fp8 as reference
from benthic.ops import gather_latents, rms_norm, rotary
from benthic.ops.cache_write import turn_and_write_keys, turn_and_write_latents

SLOTS = torch.tensor([5, 17, 0])
POSITIONS = torch.tensor([2, 0, 7])


def rotations_of(pairs):
    angles = torch.rand(8, pairs, generator=torch.Generator().manual_seed(1))
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize("interleaved", [True, False])
def test_latents(interleaved):
    torch.manual_seed(0)
    query, projected, weight = torch.randn(3, 4, 6 + 8), torch.randn(3, 16 + 8), torch.rand(16)
    table = rotations_of(4)
    pool, absorbed = torch.zeros(3, 8, 24), torch.zeros(3, 4, 24)
    turn_and_write_latents(query, projected, weight, 1e-6, table, POSITIONS, SLOTS, pool, absorbed, interleaved)
    rows = pool.view(-1, 24)[SLOTS]
    assert_close(rows[:, :16], rms_norm(projected[:, :16], weight, 1e-6), "operation_fp32")
    turned = rotary(torch.cat((query[..., 6:], projected[:, None, 16:]), 1)[None], table[POSITIONS], interleaved)[0]
    assert_close(rows[:, 16:], turned[:, 4], "operation_fp32")
    assert_close(absorbed[..., 16:], turned[:, :4], "operation_fp32")
    assert not absorbed[..., :16].any()


def test_latents_in_fp8():
    torch.manual_seed(0)
    query, projected, weight = torch.randn(3, 4, 6 + 8), torch.randn(3, 16 + 8), torch.rand(16)
    arguments = query, projected, weight, 1e-6, rotations_of(4), POSITIONS, SLOTS
    pools, turned = [torch.full((3, 8, 16 + 32 + 16), 7, dtype=torch.uint8) for _ in range(2)], torch.zeros(2, 3, 4, 24)
    turn_and_write_latents(*arguments, pools[0], turned[0], True)
    reference.turn_and_write_latents_fp8(*arguments, pools[1], turned[1], True)
    assert_close(turned[0], turned[1], "operation_fp32")
    mine, theirs = (reference.unpack(pool.view(-1, 64)[SLOTS], 16, torch.float32) for pool in pools)
    assert_close(mine[:, 16:], theirs[:, 16:], "operation_fp32")
    assert (mine - theirs).norm() < 0.02 * theirs.norm()
    assert (pools[0] == 7).all(2).sum() == 3 * 8 - 3
    tables = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    read = gather_latents(pools[0], tables, 24, 16, torch.float32)[0, SLOTS]
    assert torch.equal(read, mine)


@pytest.mark.parametrize("interleaved", [True, False])
def test_keys_and_values(interleaved):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    table, pool = rotations_of(4), torch.zeros(3, 8, 28)
    turned = turn_and_write_keys(query, key, value, table, POSITIONS, SLOTS, pool, interleaved)
    rows = pool.view(-1, 28)[SLOTS]
    assert_close(turned, rotary(query[None], table[POSITIONS], interleaved)[0], "operation_fp32")
    assert_close(rows[:, :16], rotary(key[None], table[POSITIONS], interleaved)[0].flatten(1), "operation_fp32")
    assert torch.equal(rows[:, 16:], value.flatten(1))

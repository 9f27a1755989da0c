"""Rows of a paged cache hold what the model's own operations make of them."""

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.ops import rms_norm, rotary
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

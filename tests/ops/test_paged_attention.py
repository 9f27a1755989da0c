"""Attention over blocks is attention over the rows that lie in them."""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import attention as reference

BLOCK = 4


def scattered(lengths: list[int], width: int, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list]:
    """A pool, the tables of sequences whose blocks lie in it in no order, and their rows."""
    per_sequence = -(-max(lengths) // BLOCK)
    order = torch.randperm(per_sequence * len(lengths) + 3, generator=stream)
    tables = order[: per_sequence * len(lengths)].view(len(lengths), -1).to(torch.int32)
    # Not numbers wherever no sequence has written: a block's owner before may have left them.
    pool = torch.full((len(order), BLOCK, width), torch.nan)
    for table, length in zip(tables.long(), lengths, strict=True):
        for place in range(length):
            pool[table[place // BLOCK], place % BLOCK] = torch.randn(width, generator=stream)
    rows = [pool[table.long()].flatten(0, 1)[:length] for table, length in zip(tables, lengths, strict=True)]
    return pool, tables, rows


def offsets(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


CALLS = [
    pytest.param([1], [1], id="a first token"),
    pytest.param([1, 1, 1], [9, 3, 4], id="decoding"),
    pytest.param([2, 2], [2, 11], id="drafts"),
    pytest.param([1, 1, 3, 8], [5, 12, 3, 10], id="decoding beside chunks"),
]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("counts", "lengths"), CALLS)
def test_absorbed_attention_over_blocks(counts, lengths, first):
    stream, heads, rank, rotary = torch.Generator().manual_seed(0), 3, 8, 4
    lengths = [length + first for length in lengths]
    pool, tables, rows = scattered(lengths, rank + rotary, stream)
    query = torch.randn(sum(counts), heads, rank + rotary, generator=stream)
    starts, ends = offsets(counts), torch.tensor(lengths, dtype=torch.int32)
    out = ops.absorbed_paged_attention(query, pool, tables, starts, ends, 0.3, rank, first)
    for index, mine in enumerate(query.split(counts)):
        stored = rows[index][first:]
        key, value = stored[None, :, None], stored[None, :, None, :rank]
        seen = torch.ones(len(mine), len(stored), dtype=torch.bool).tril(len(stored) - len(mine))
        expected = reference.attention(mine[None], key, value, 0.3, seen[None])[0]
        assert_close(out[starts[index] : starts[index + 1]], expected, "operation_fp32")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("counts", "lengths"), CALLS)
def test_attention_over_blocks(counts, lengths, key_heads, first):
    stream, heads, width = torch.Generator().manual_seed(0), 4, 6
    lengths = [length + first for length in lengths]
    pool, tables, rows = scattered(lengths, 2 * key_heads * width, stream)
    query = torch.randn(sum(counts), heads, width, generator=stream)
    starts, ends = offsets(counts), torch.tensor(lengths, dtype=torch.int32)
    out = ops.paged_attention(query, pool, tables, starts, ends, 0.3, key_heads, first)
    for index, mine in enumerate(query.split(counts)):
        key, value = rows[index][first:].chunk(2, -1)
        key, value = (part.unflatten(-1, (key_heads, -1))[None] for part in (key, value))
        seen = torch.ones(len(mine), key.shape[1], dtype=torch.bool).tril(key.shape[1] - len(mine))
        expected = reference.attention(mine[None], key, value, 0.3, seen[None])[0]
        assert_close(out[starts[index] : starts[index + 1]], expected, "operation_fp32")


def test_rows_are_written_where_their_slots_say_and_gathered_in_order():
    pool = torch.zeros(5, BLOCK, 3)
    rows = torch.arange(18.0).view(6, 3)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    ops.write_rows(pool, rows, torch.tensor([12, 13, 14, 15, 4, 5]))
    assert torch.equal(ops.gather_rows(pool, table, 6)[0], rows)
    assert torch.equal(ops.gather_rows(pool, table, 3)[0], rows[:3])
    neighbours = torch.tensor([[3, 4]], dtype=torch.int32)
    assert torch.equal(ops.gather_rows(pool, neighbours, 7)[0], pool[3:5].flatten(0, 1)[:7])
    assert not pool[[0, 2, 4]].any()

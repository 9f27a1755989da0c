"""A step's work as tensors: the tokens, and where their rows go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.model.pages import Pages


class Stretch(NamedTuple):
    """Neighbouring tokens of one sequence: `tokens` from position `start` on, rows in `blocks`."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]


def bounds_of(stretches: Sequence[Stretch]) -> tuple[int, ...]:
    """Where each one's rows begin, and where the last one's end."""
    return (0, *accumulate(len(stretch.tokens) for stretch in stretches))


def rows_of(stretches: Sequence[Stretch], block_size: int) -> Tensor:
    """Token ids, positions and slots, int64 [3, T]."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for stretch in stretches:
        places = range(stretch.start, stretch.start + len(stretch.tokens))
        tokens += stretch.tokens
        positions += places
        slots += [stretch.blocks[place // block_size] * block_size + place % block_size for place in places]
    return torch.tensor([tokens, positions, slots])


def lay_out(
    stretches: Sequence[Stretch], pools: Sequence[Tensor], block_size: int, device: torch.device, first: int = 0
) -> tuple[Tensor, Pages]:
    """Token ids int64 [T] and their pages; `stretches` come with the shortest first."""
    bounds, rows = bounds_of(stretches), rows_of(stretches, block_size)
    totals = tuple(stretch.start + len(stretch.tokens) for stretch in stretches)
    longest = -(-max(totals) // block_size)
    tables: list[int] = []
    for stretch in stretches:
        table = stretch.blocks[:longest]
        tables += table
        tables += [0] * (longest - len(table))
    starts, lengths, flat = _together([bounds, totals, tables], device)
    pages = Pages(
        pools=pools,
        counts=tuple(len(stretch.tokens) for stretch in stretches),
        totals=totals,
        bounds=bounds,
        positions=rows[1].to(device),
        slots=rows[2].to(device),
        tables=flat.view(len(stretches), longest),
        starts=starts,
        lengths=lengths,
        first=first,
    )
    return rows[0].to(device), pages


def _together(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Small numbers as int32 by one copy. Each begins at 16 bytes: kernels are compiled anew where one does not."""
    numbers: list[int] = []
    begins = []
    for part in parts:
        begins.append(len(numbers))
        numbers += part
        numbers += [0] * (-len(numbers) % 4)
    whole = torch.tensor(numbers, dtype=torch.int32).to(device)
    return [whole[begin : begin + len(part)] for begin, part in zip(begins, parts, strict=True)]

"""The same states whether tokens come all at once, in chunks, or beside other sequences."""

from __future__ import annotations

import pytest
import torch

from benthic.model.pages import Pages, make_pools
from benthic.numerics.compare import assert_close
from tests.model.configs import CONFIGS, randomised, tiny, tokens

BLOCK = 4


def pages_of(pools: list[torch.Tensor], spans: list[tuple[int, int, torch.Tensor]], first: int = 0) -> Pages:
    """Of (new tokens, tokens with them, table) for each sequence."""
    counts, totals = tuple(span[0] for span in spans), tuple(span[1] for span in spans)
    starts = torch.tensor([0, *counts]).cumsum(0)
    places = [torch.arange(total - count, total) for count, total, _ in spans]
    slots = [
        table[place // BLOCK].long() * BLOCK + place % BLOCK for place, (_, _, table) in zip(places, spans, strict=True)
    ]
    return Pages(
        pools=pools,
        counts=counts,
        totals=totals,
        bounds=tuple(starts.tolist()),
        positions=torch.cat(places),
        slots=torch.cat(slots),
        tables=torch.stack([table for _, _, table in spans]).to(torch.int32),
        starts=starts.to(torch.int32),
        lengths=torch.tensor(totals, dtype=torch.int32),
        first=first,
    )


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_ragged_calls_over_pages_give_the_states_of_whole_sequences(name):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 3, 40)
    pools = make_pools(config, 40, BLOCK, "cpu", torch.float32, config.num_hidden_layers)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:30].view(3, 10)
    expected = model.states(ids).hidden
    # Each call: (sequence, new tokens), fewest first; 20 and 30 are enough to be expanded.
    done, found = [0, 0, 0], [[], [], []]
    for call in [
        [(0, 3)],
        [(0, 1), (1, 20)],
        [(0, 1), (1, 1), (2, 30)],
        [(1, 2), (2, 10), (0, 20)],
        [(0, 15), (1, 17)],
    ]:
        spans = [(count, done[which] + count, tables[which]) for which, count in call]
        taken = torch.cat([ids[which, done[which] : done[which] + count] for which, count in call])
        states = model.paged_states(taken, pages_of(pools, spans)).hidden[0]
        for (which, count), part in zip(call, states.split([count for _, count in call]), strict=True):
            found[which].append(part)
            done[which] += count
    for which, parts in enumerate(found):
        assert done[which] == 40
        assert_close(torch.cat(parts), expected[which], "model_fp32")


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].get("num_nextn_predict_layers")])
@torch.inference_mode()
def test_prediction_layers_over_pages_give_the_states_of_training(name):
    config = tiny(**CONFIGS[name])
    depths = config.num_nextn_predict_layers
    model, ids = randomised(config), tokens(config, 1, 20)
    pools = make_pools(config, 8, BLOCK, "cpu", torch.float32, config.num_hidden_layers + depths)
    table = torch.tensor([7, 2, 5, 0, 3])
    states = model.states(ids, num_predictions=depths)
    known = states.hidden
    for depth in range(1, depths + 1):
        parts = []
        for begin, end in [(depth, 9), (9, 10), (10, 20)]:
            pages = pages_of(pools, [(end - begin, end, table)], first=depth)
            parts.append(
                model.paged_prediction(depth - 1, ids[0, begin:end], known[0, begin - depth : end - depth], pages)
            )
        assert_close(torch.cat(parts), states.predictions[depth - 1][0], "model_fp32")
        known = states.predictions[depth - 1]

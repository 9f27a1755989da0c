"""The same states whether tokens come all at once, in chunks, or beside other sequences."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ConfigError
from benthic.model.pages import Pages, make_pools, row_format
from benthic.numerics.compare import assert_close
from tests.model.configs import CONFIGS, randomised, tiny, tokens

BLOCK = 4
CPU = torch.device("cpu")
# Calls of (sequence, new tokens), fewest first; 20 and 30 are enough to be expanded.
CALLS = [
    [(0, 3)],
    [(0, 1), (1, 20)],
    [(0, 1), (1, 1), (2, 30)],
    [(1, 2), (2, 10), (0, 20)],
    [(0, 15), (1, 17)],
]


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
    pools = make_pools(row_format(config, torch.float32, CPU), 40, BLOCK, CPU, config.num_hidden_layers)
    expected = model.states(ids).hidden
    for which, found in enumerate(ragged(model, ids, pools, CALLS)):
        assert_close(found, expected[which], "model_fp32")


def ragged(model, ids, pools, calls):
    """States of each sequence of `ids` that `calls` leave."""
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:30].view(3, 10)
    done, found = [0, 0, 0], [[], [], []]
    for call in calls:
        spans = [(count, done[which] + count, tables[which]) for which, count in call]
        taken = torch.cat([ids[which, done[which] : done[which] + count] for which, count in call])
        states = model.paged_states(taken, pages_of(pools, spans)).hidden[0]
        for (which, count), part in zip(call, states.split([count for _, count in call]), strict=True):
            found[which].append(part)
            done[which] += count
    assert done == [ids.shape[1]] * 3
    return [torch.cat(parts) for parts in found]


@torch.inference_mode()
def test_latents_in_fp8_are_read_alike_by_every_call_and_cost_little_precision():
    config = tiny(**CONFIGS["dense latent with prediction"] | {"kv_lora_rank": 32})
    model, ids = randomised(config), tokens(config, 3, 40)
    row = row_format(config, torch.float32, CPU, "float8")
    assert (row.num_bytes, row.dtype) == (32 + 4 * 4 + 16, torch.uint8)
    once = [[(0, 40), (1, 40), (2, 40)]]
    whole, parts = (
        ragged(model, ids, make_pools(row, 40, BLOCK, CPU, config.num_hidden_layers), calls) for calls in (once, CALLS)
    )
    for one, other, expected in zip(parts, whole, model.states(ids).hidden, strict=True):
        assert_close(one, other, "model_fp32")
        assert 0 < (one - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "a float8 cache keeps latents; this model's attention is gqa"),
        (
            CONFIGS["v3"],
            "kv_lora_rank 12 and qk_rope_head_dim 4 make rows of 44 bytes; a float8 cache needs a multiple",
        ),
    ],
)
def test_models_that_fp8_latents_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        row_format(tiny(**changes), torch.float32, CPU, "float8")


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].get("num_nextn_predict_layers")])
@torch.inference_mode()
def test_prediction_layers_over_pages_give_the_states_of_training(name):
    config = tiny(**CONFIGS[name])
    depths = config.num_nextn_predict_layers
    model, ids = randomised(config), tokens(config, 1, 20)
    pools = make_pools(row_format(config, torch.float32, CPU), 8, BLOCK, CPU, config.num_hidden_layers + depths)
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

"""Names, shapes, input checks, prediction layers, packed documents."""

from __future__ import annotations

import re

import pytest
import torch

from benthic.config import ModelConfig
from benthic.config.manifest import parameters
from benthic.config.published import preset_names
from benthic.errors import RequestError
from benthic.model import Cache, LanguageModel, initialise
from tests.model.configs import CONFIGS, randomised, tiny, tokens


@pytest.mark.parametrize("preset", preset_names())
def test_manifest_states_every_tensor_of_the_model(preset):
    config = ModelConfig.from_pretrained(preset)
    model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stated = {
        row.name: (row.shape, torch.float32 if row.dtype == "float32" else torch.bfloat16) for row in parameters(config)
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == stated
    assert set(model.state_dict()) == set(stated)


def test_the_routing_bias_stays_float32_and_exact():
    model = randomised(tiny(**CONFIGS["v3"]))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.linspace(5.0, 5.01, len(bias)))
    kept = bias.clone()
    for cast in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("cpu", torch.bfloat16)):
        cast()
        after = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert after.dtype == torch.float32
        assert torch.equal(after, kept)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    assert len({float(value) for value in kept}) == 8


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_follows_float32(name):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 2, 12)
    expected = model(ids)
    model.to(torch.bfloat16)
    cache = Cache(config, 2, 12, dtype=torch.bfloat16)
    cached = torch.cat([model(chunk, cache=cache) for chunk in ids.split((6, 1, 5), 1)], 1)
    assert cached.dtype == torch.bfloat16
    # A near-tie of two experts may fall the other way, so a few tokens may differ: all but few agree.
    assert (cached.float() - expected).abs().median() < 0.05
    assert (model(ids).float() - expected).abs().median() < 0.05


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            "input_ids is torch.int64 of shape [3]; it must be int64 [sequences, tokens]",
        ),
        (torch.zeros(1, 3, dtype=torch.int32), "input_ids is torch.int32 of shape [1, 3]"),
        (torch.zeros(1, 0, dtype=torch.int64), "of shape [1, 0]"),
        (torch.zeros(0, 4, dtype=torch.int64), "of shape [0, 4]"),
        (torch.tensor([[3, 61]]), "input_ids holds 61; the vocabulary has 61 tokens, 0 to 60"),
        (torch.tensor([[3, -1]]), "input_ids holds -1; the vocabulary has 61 tokens"),
        (
            torch.zeros(1, 65, dtype=torch.int64),
            "65 positions were asked for; the model's max_position_embeddings is 64",
        ),
    ],
)
def test_wrong_tokens_are_refused(ids, message):
    model = randomised(tiny(**CONFIGS["v3"]))
    with pytest.raises(RequestError, match=re.escape(message)):
        model(ids)


@pytest.mark.usefixtures("_as_a_user")
def test_what_a_cache_cannot_hold_is_refused():
    config = tiny(**CONFIGS["v3"])
    model, ids = randomised(config), tokens(config, 2, 8)
    with pytest.raises(RequestError, match="input_ids holds 2 sequences, but the cache was made for 3"):
        model(ids, cache=Cache(config, 3, 16))
    cache = Cache(config, 2, 10)
    model(ids, cache=cache)
    with pytest.raises(RequestError, match="the cache holds 8 of 10 positions; 8 more do not fit"):
        model(ids, cache=cache)
    with pytest.raises(RequestError, match="max_position_embeddings allows 1 to 64"):
        Cache(config, 2, 65)
    with pytest.raises(RequestError, match="no prediction layers"):
        model.states(ids, cache=Cache(config, 2, 16), num_predictions=1)
    with pytest.raises(RequestError, match="with 1 prediction layers and 8 tokens it can be 0 to 1"):
        model.states(ids, num_predictions=2)
    with pytest.raises(RequestError, match=re.escape("documents has shape [2]; it must be that of input_ids, [2, 8]")):
        model.states(ids, documents=torch.zeros(2, dtype=torch.int64))


def test_a_cache_row_is_as_wide_as_the_config_says():
    for changes in CONFIGS.values():
        config = tiny(**changes)
        assert [rows.shape for rows in Cache(config, 2, 5)._layers] == [(2, 5, config.cache_width)] * 3


def test_routing_covers_every_expert_layer():
    config = tiny(**CONFIGS["v3"])
    model, ids = randomised(config), tokens(config, 2, 5)
    routing = model.states(ids, num_predictions=1).routing
    assert {layer: chosen.experts.shape for layer, chosen in routing.items()} == {1: (10, 3), 2: (10, 3), 3: (8, 3)}
    for chosen in routing.values():
        assert chosen.scores.dtype == chosen.weights.dtype == torch.float32
        assert chosen.experts.dtype == torch.int64
        assert chosen.scores.shape[1] == 8


def test_initialise_depends_on_the_seed_alone():
    config = tiny(**CONFIGS["v3"])
    first, second, other = (LanguageModel(config) for _ in range(3))
    initialise(first, 7)
    torch.randn(5)
    initialise(second, 7)
    initialise(other, 8)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    weight = first.model.embed_tokens.weight.detach()
    assert float(weight.std()) == pytest.approx(config.initializer_range, rel=0.1)
    assert torch.equal(first.model.norm.weight, torch.ones(16))
    assert not first.model.layers[1].mlp.gate.e_score_correction_bias.any()
    assert not torch.equal(first.model.layers[1].mlp.gate.weight, first.model.layers[2].mlp.gate.weight)

"""The load of experts is that of the tokens which the model computed."""

from __future__ import annotations

import pytest
import torch

from benthic.inference.expert_load import LEAST_MEAN, ExpertLoad
from benthic.model.sampling import SamplingParams
from benthic.ops.route import Routing
from tests.model.configs import CONFIGS, randomised, tiny

CONFIG = tiny(**CONFIGS["v3"])
LAYERS = [layer for layer in range(CONFIG.num_hidden_layers) if CONFIG.is_expert_layer(layer)]


def routing(experts):
    """The same choice of `experts` [T, K] in every layer."""
    return {layer: Routing(torch.empty(0), experts, torch.empty(0)) for layer in LAYERS}


def test_a_balanced_load_is_one_and_the_worst_is_experts_over_chosen():
    experts, chosen = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
    load = ExpertLoad(CONFIG, torch.device("cpu"))
    even = torch.arange(LEAST_MEAN * experts * chosen).view(-1, chosen) % experts
    load.add(routing(even), len(even))
    assert load.take() == [(layer, 1.0, 0) for layer in LAYERS]
    load.add(routing(torch.arange(chosen).expand(len(even), -1)), len(even))
    assert load.take() == [(layer, pytest.approx(experts / chosen), 0) for layer in LAYERS]


def test_too_few_tokens_are_kept_for_the_next_look():
    load, chosen = ExpertLoad(CONFIG, torch.device("cpu")), CONFIG.num_experts_per_tok
    half = torch.arange(chosen).expand(LEAST_MEAN * CONFIG.n_routed_experts // chosen // 2 + 1, -1)
    load.add(routing(half), len(half))
    assert load.take() == []
    load.add(routing(half.repeat(2, 1)), len(half))  # rows behind the step's own are no tokens
    experts = CONFIG.n_routed_experts
    assert load.take() == [(layer, pytest.approx(experts / chosen), experts - chosen) for layer in LAYERS]
    assert load.take() == []


@pytest.mark.parametrize("speculative", [False, True])
def test_an_engine_counts_the_choices_of_every_token_it_computed(speculative, make_engine):
    engine = make_engine(randomised(CONFIG), speculative, block_size=4, num_blocks=40, max_step_tokens=8)
    (done,) = engine.generate([list(range(20))], SamplingParams(max_tokens=12, temperature=0, routed_experts=True))
    found = done.routed_experts.long()  # [tokens, layers, K]
    counts = engine.expert_load._counts
    wanted = torch.stack(
        [found[:, place].flatten().bincount(minlength=counts.shape[1]) for place in range(len(LAYERS))]
    )
    if speculative:  # drafts that were wrong went to experts too
        assert (counts >= wanted).all()
    else:
        assert torch.equal(counts, wanted)


def test_a_dense_model_has_no_load(make_engine):
    engine = make_engine(randomised(tiny(**CONFIGS["multi-query with predictions"])), num_blocks=8)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert engine.expert_load.take() == []

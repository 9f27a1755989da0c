"""Weights that lie behind one another are multiplied at once, and give what they gave apart."""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.model import joined
from benthic.model.feed_forward import FeedForward
from benthic.model.float8_storage import StoredFloat8Experts, store_in_float8
from benthic.model.joined import JoinedFeedForward, JoinedLatentAttention, join_projections
from benthic.numerics.compare import assert_close
from benthic.ops.expert_decode import few_token_experts
from benthic.ops.route import Routing
from tests.model.configs import CONFIGS, randomised, tiny, tokens
from tests.model.test_float8_storage import wide


@pytest.mark.parametrize("name", CONFIGS)
def test_joined_projections_give_what_they_gave_apart(name):
    model = randomised(tiny(**CONFIGS[name]))
    ids = tokens(model.config, 2, 12)
    names, weights = zip(*((name, one.clone()) for name, one in model.named_parameters()), strict=True)
    with torch.no_grad():
        expected = model(ids)
    join_projections(model)
    dense = [module for module in model.modules() if isinstance(module, FeedForward)]
    assert all(type(module) is JoinedFeedForward for module in dense)
    with torch.no_grad():
        assert_close(model(ids), expected, "model_fp32")
    assert tuple(name for name, _ in model.named_parameters()) == names
    assert all(torch.equal(one, before) for one, before in zip(model.parameters(), weights, strict=True))
    # With gradients nothing is joined.
    model(ids).sum().backward()
    assert all(one.grad is not None for one in model.model.layers[0].self_attn.parameters())


@torch.no_grad()
def test_joined_projections_in_fp8():
    config = wide("v3", q_lora_rank=128)
    model = randomised(config)
    store_in_float8(model)
    ids = tokens(config, 2, 12)
    expected = model(ids)
    join_projections(model)
    attention = model.model.layers[0].self_attn
    assert type(attention) is JoinedLatentAttention
    assert type(model.model.layers[1].mlp.shared_experts) is JoinedFeedForward
    # A width of 144 ends within a block, which the other matrix's would run into.
    assert type(model.model.layers[0].mlp) is FeedForward
    assert_close(model(ids), expected, "model_fp32")


@torch.no_grad()
def test_weights_that_were_changed_or_moved_count():
    config = tiny(**CONFIGS["v3"])
    model, ids = randomised(config), tokens(config, 1, 9)
    join_projections(model)
    feed_forward = model.model.layers[0].mlp
    before = model(ids)
    feed_forward.up_proj.weight.mul_(2)
    doubled = model(ids)
    assert (doubled - before).abs().max() > 0.01
    feed_forward.up_proj.weight.data = feed_forward.up_proj.weight.detach() / 2
    assert_close(model(ids), before, "model_fp32")


@torch.no_grad()
@pytest.mark.parametrize("name", ["v3", "v3 of two predictions"])
def test_shared_experts_in_the_routed_ones_call_give_what_they_gave_apart(name, monkeypatch):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 2, 12)
    expected = model(ids)
    calls = []

    def counted(*arguments):
        calls.append(len(arguments))
        return few_token_experts(*arguments)

    monkeypatch.setattr(ops, "few_token_experts", counted)
    join_projections(model)
    assert_close(model(ids), expected, "model_fp32")
    assert not calls, "a processor takes them one after another"
    monkeypatch.setattr(joined, "_reads_together", lambda *_: True)
    assert_close(model(ids), expected, "model_fp32")
    assert calls == [7] * sum(config.is_expert_layer(layer) for layer in range(config.num_hidden_layers))


def test_shared_experts_are_read_along_for_few_tokens_and_plain_weights_alone():
    model = randomised(tiny(**CONFIGS["v3"]))
    join_projections(model)
    layer = next(module for module in model.modules() if isinstance(module, joined.JoinedExpertLayer))

    class OnGpu(torch.Tensor):
        is_cuda = True

    def reads(tokens: int, count: int | None = None) -> bool:
        routing = Routing(torch.zeros(tokens, 8), torch.zeros(tokens, 6, dtype=torch.int64), torch.zeros(tokens, 6))
        with torch.no_grad():
            return joined._reads_together(
                torch.zeros(tokens, 4).as_subclass(OnGpu), routing._replace(count=count), layer.experts
            )

    assert reads(1)
    assert reads(32)
    assert not reads(33)
    assert not reads(1, count=4)
    layer.experts.__class__ = StoredFloat8Experts
    assert not reads(1)

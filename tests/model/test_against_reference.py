"""The model, its cache and its gradients equal numerics/reference/model.py on everything a config can say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.model import Cache, LanguageModel
from benthic.numerics.compare import assert_close
from benthic.numerics.reference.model import forward
from tests.model.configs import CONFIGS, EXPERTS, LATENT, randomised, tiny, tokens


def compare(config: ModelConfig, batch: int, length: int, documents: torch.Tensor | None = None) -> None:
    model, ids = randomised(config), tokens(config, batch, length)
    depth = min(config.num_nextn_predict_layers, length - 1)
    states = model.states(ids, documents=documents, num_predictions=depth)
    expected = forward(model.state_dict(), config, ids, documents)
    assert_close(states.hidden @ model.head_weight.T, expected.logits, "model_fp32")
    for state, logits in zip(states.predictions, expected.predictions, strict=False):
        assert_close(state @ model.head_weight.T, logits, "model_fp32")
    for layer, routing in states.routing.items():
        assert torch.equal(routing.experts.sort().values, expected.experts[layer].sort().values)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_model_equals_reference(name):
    compare(tiny(**CONFIGS[name]), 2, 11)


@pytest.mark.parametrize("name", ["v3 of two predictions", "grouped-query with biases", "v2 with yarn"])
@torch.no_grad()
def test_attention_stays_within_a_document(name):
    config = tiny(**CONFIGS[name])
    documents = torch.tensor([[0] * 4 + [1] * 3 + [2] * 4, [5] * 11])
    compare(config, 2, 11, documents)
    model, ids = randomised(config), tokens(config, 2, 11)
    packed = model.states(ids, documents=documents).hidden
    alone = model.states(ids[:1, 4:7]).hidden
    assert_close(packed[:1, 4:7], alone, "model_fp32")
    assert not torch.allclose(packed[:1, 4:7], model.states(ids).hidden[:1, 4:7], atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_both_forms_of_attention_and_every_way_to_fill_a_cache_agree(name):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 3, 14)
    expected = forward(model.state_dict(), config, ids, absorbed=True).logits
    assert_close(model(ids), expected, "model_fp32")
    for sizes in ([14], [1] * 14, [5, 1, 1, 7], [1, 13]):
        cache = Cache(config, 3, 20)
        logits = torch.cat([model(chunk, cache=cache) for chunk in ids.split(sizes, 1)], 1)
        assert_close(logits, expected, "model_fp32", f"chunks of {sizes}")
        assert cache.length == 14


def test_a_cache_may_be_used_while_gradients_are_recorded():
    for name in ("v3", "grouped-query with biases"):
        config = tiny(**CONFIGS[name])
        model, ids = randomised(config), tokens(config, 2, 9)
        cache = Cache(config, 2, 9)
        logits = torch.cat([model(chunk, cache=cache).detach() for chunk in ids.split((4, 1, 4), 1)], 1)
        assert_close(logits, forward(model.state_dict(), config, ids).logits, "model_fp32")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_the_reference(name):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 2, 9)
    depth = config.num_nextn_predict_layers
    states = model.states(ids, num_predictions=depth)
    outputs = [state @ model.head_weight.T for state in (states.hidden, *states.predictions)]
    tensors = {
        name: tensor.detach().clone().requires_grad_(name in dict(model.named_parameters()))
        for name, tensor in model.state_dict().items()
    }
    expected = forward(tensors, config, ids)
    stream = torch.Generator().manual_seed(3)
    for ours, theirs in zip(outputs, (expected.logits, *expected.predictions), strict=True):
        weight = torch.randn(ours.shape, generator=stream)
        (ours * weight).sum().backward(retain_graph=True)
        (theirs * weight).sum().backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        wanted = tensors[name].grad
        scale = wanted.abs().max().clamp(min=1e-3)
        assert_close(parameter.grad / scale, wanted / scale, "gradient_fp32", name)


def a_config(draw: st.DrawFn) -> dict:
    changes = {"num_hidden_layers": draw(st.integers(1, 2)), "tie_word_embeddings": draw(st.booleans())}
    changes["rope_interleave"] = draw(st.booleans())
    if draw(st.booleans()):
        changes |= LATENT | {"q_lora_rank": draw(st.sampled_from([None, 7])), "qkv_bias": draw(st.booleans())}
    else:
        changes |= {"num_key_value_heads": draw(st.sampled_from([1, 2, 4])), "qk_norm": draw(st.booleans())}
        changes |= {"norm_placement": draw(st.sampled_from(["before", "after"]))}
    if draw(st.booleans()):
        method = draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]))
        groups = 1 if method == "greedy" else draw(st.sampled_from([1, 2, 4]))
        kept = draw(st.integers(1, groups))
        chosen = draw(st.integers(1, kept * 8 // groups))
        changes |= EXPERTS | {
            "topk_method": method,
            "n_group": groups,
            "topk_group": kept,
            "num_experts_per_tok": chosen,
        }
        changes |= {"n_shared_experts": draw(st.integers(0, 2)), "norm_topk_prob": draw(st.booleans())}
        changes |= {"scoring_func": draw(st.sampled_from(["sigmoid", "softmax"]))}
    if changes.get("norm_placement") != "after":
        changes["num_nextn_predict_layers"] = draw(st.integers(0, 2))
    return changes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.composite(a_config)(), st.integers(1, 3), st.integers(3, 8))
@torch.no_grad()
def test_any_config_equals_the_reference(changes, batch, length):
    compare(tiny(**changes), batch, length)


@torch.no_grad()
def test_one_token_of_one_sequence():
    config = tiny(**CONFIGS["v3"])
    model: LanguageModel = randomised(config)
    ids = tokens(config, 1, 1)
    logits, predictions = model(ids, return_mtp=True)
    assert logits.shape == (1, 1, 61)
    assert [prediction.shape for prediction in predictions] == [(1, 0, 61)]
    expected = forward(model.state_dict(), config.replace(num_nextn_predict_layers=0), ids)
    assert_close(logits, expected.logits, "model_fp32")

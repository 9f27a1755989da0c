"""The model computes what transformers computes, from the same state dict."""

from __future__ import annotations

import pytest
import torch

from benthic.config import ModelConfig
from benthic.config.published import config_from_published
from benthic.model import Cache, LanguageModel
from benthic.numerics.compare import assert_close
from tests.model.families import FAMILIES, VOCABULARY, oracle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def ours(reference: torch.nn.Module) -> LanguageModel:
    config: ModelConfig = config_from_published(reference.config.to_dict())
    model = LanguageModel(config).eval()
    state = reference.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=True)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    reference = oracle(name)
    model, ids = ours(reference), tokens(2, 40)
    expected = reference(ids).logits
    assert 0.3 < expected.std() < 4
    assert_close(model(ids), expected, "model_fp32")
    cache = Cache(model.config, 2, 40)
    chunks = [model(chunk, cache=cache) for chunk in ids.split((17, 1, 1, 21), 1)]
    assert_close(torch.cat(chunks, 1), expected, "model_fp32")


@pytest.mark.parametrize("name", ["v3", "v2 group-limited", "olmo2", "qwen2"])
def test_gradients_equal_those_of_transformers(name):
    reference = oracle(name)
    model, ids = ours(reference), tokens(2, 24)
    targets = tokens(2, 25)[:, 1:]
    for network in (lambda: reference(ids).logits, lambda: model(ids)):
        torch.nn.functional.cross_entropy(network().flatten(0, 1), targets.flatten()).backward()
    parameters = dict(model.named_parameters())
    for path, parameter in reference.named_parameters():
        if path in parameters:
            assert_close(parameters[path].grad, parameter.grad, "gradient_fp32", path)

"""The router's kernel against the reference (one token at a time), and its gradient against autograd's."""

import pytest
import torch

from benthic.config import ModelConfig
from benthic.numerics.reference import routing as reference
from tests.model.configs import tiny

kernels = pytest.importorskip("benthic.kernels.route", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")

V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
GREEDY = {"topk_method": "greedy", "scoring_func": "softmax"}
ROUTERS = {
    "v3": V3 | {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    "the bench model": V3 | {"n_routed_experts": 64, "num_experts_per_tok": 6},
    "v2: groups of twenty": V2 | {"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
    "three groups of five": V3 | {"n_routed_experts": 15, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2},
    "v2-lite": GREEDY | {"n_routed_experts": 64, "num_experts_per_tok": 6, "norm_topk_prob": False},
    "normalised softmax": GREEDY | {"n_routed_experts": 13, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "switch": GREEDY | {"n_routed_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "all chosen": V3 | {"n_routed_experts": 6, "num_experts_per_tok": 6},
    "sixteen of 512": V3 | {"n_routed_experts": 512, "num_experts_per_tok": 16, "n_group": 16, "topk_group": 5},
}


def config_of(name: str) -> ModelConfig:
    return tiny(moe_intermediate_size=10, routed_scaling_factor=2.5, **ROUTERS[name])


def inputs(config: ModelConfig, tokens: int, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, config.n_routed_experts, generator=generator)
    bias = torch.randn(config.n_routed_experts, generator=generator) - 1
    return logits.to(device), bias.to(device) if config.has_routing_bias else None


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_a_routing_equals_the_reference(name, tokens, device):
    config = config_of(name)
    logits, bias = inputs(config, tokens, device)
    scores, experts, weights = kernels.route(logits, bias, config)
    expected = reference.route(logits.cpu(), None if bias is None else bias.cpu(), config)
    torch.testing.assert_close(scores.cpu(), expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(experts.cpu(), expected[1])
    torch.testing.assert_close(weights.cpu(), expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("used", ["both", "scores", "weights"])
def test_a_gradient_equals_autograds(name, used, device):
    config = config_of(name)
    logits, bias = inputs(config, 9, "cpu")
    logits.requires_grad_()
    scores, experts, weights = reference.route(logits, bias, config)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator) for x in (scores, weights)]
    wanted = {"both": [0, 1], "scores": [0], "weights": [1]}[used]
    expected = torch.autograd.grad([(scores, weights)[i] for i in wanted], logits, [grads[i] for i in wanted])[0]
    given = [grads[i].to(device) if i in wanted else None for i in range(2)]
    actual = kernels.route_backward(*given, scores.detach().to(device), experts.to(device), config)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_of_equal_scores_the_lower_expert_and_group_win(device):
    config = config_of("three groups of five")
    _, experts, weights = kernels.route(torch.zeros(2, 15, device=device), torch.zeros(15, device=device), config)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights.cpu(), torch.full((2, 3), 2.5 / 3))


def test_negative_biases_do_not_bring_masked_groups_back(device):
    config = config_of("three groups of five")
    logits, bias = inputs(config, 20, device)
    assert torch.equal(kernels.route(logits, bias, config)[1], kernels.route(logits, bias - 50, config)[1])


@pytest.mark.parametrize("name", ["v3", "three groups of five", "v2: groups of twenty", "normalised softmax"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_are_no_numbers_still_name_different_experts(name, value, device):
    config = config_of(name)
    logits, bias = inputs(config, 3, device)
    logits[0], logits[1, ::2] = value, value
    _, experts, _ = kernels.route(logits, bias, config)
    assert experts.min() >= 0
    assert experts.max() < config.n_routed_experts
    assert all(len(set(row)) == config.num_experts_per_tok for row in experts.tolist())


def test_no_tokens_are_routed_nowhere(device):
    config = config_of("v3")
    scores, experts, weights = kernels.route(*inputs(config, 0, device), config)
    assert (scores.shape, experts.shape, weights.shape) == ((0, 256), (0, 8), (0, 8))
    assert kernels.route_backward(scores, None, scores, experts, config).shape == (0, 256)

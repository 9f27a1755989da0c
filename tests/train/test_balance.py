"""Balancing against sums written out by hand, and a router that the bias brings into balance."""

import numpy as np
import pytest
import torch

from benthic.config.train import BalanceConfig
from benthic.errors import ConfigError
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.ops import Routing, route
from benthic.train.auxiliary_loss import auxiliary_loss, group_losses
from benthic.train.balance import (
    count_loads,
    max_violation,
    move_biases,
    scaled_speed,
)
from benthic.train.step import routing_biases
from tests.train.small import small_model, small_run

SEQUENCES, LENGTH, EXPERTS, CHOSEN = 3, 10, 8, 2


def random_routing(seed=0, bias=0.0):
    scores = torch.rand(SEQUENCES * LENGTH, EXPERTS, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    skew = bias * torch.arange(EXPERTS) / EXPERTS
    experts = (scores.detach() + skew).topk(CHOSEN).indices
    return Routing(scores, experts, scores.gather(1, experts))


def by_hand(scores, experts):
    """The balance loss of one stretch of tokens, as the papers write it."""
    tokens, num_experts = scores.shape
    total = 0.0
    for expert in range(num_experts):
        frequency = num_experts / (CHOSEN * tokens) * sum(expert in row for row in experts.tolist())
        probability = np.mean([row[expert] / row.sum() for row in scores])
        total += frequency * probability
    return total


def parts(routing, rows):
    scores = routing.scores.detach().double().numpy().reshape(rows, -1, EXPERTS)
    return scores, routing.experts.numpy().reshape(rows, -1, CHOSEN)


def test_sequence_loss_counts_the_best_unbiased_scores_of_each_sequence():
    routing = random_routing(bias=5.0)
    scores, _ = parts(routing, SEQUENCES)
    best = [np.argsort(-one, axis=1)[:, :CHOSEN] for one in scores]
    expected = np.mean([by_hand(one, chosen) for one, chosen in zip(scores, best, strict=True)])
    assert auxiliary_loss("sequence", routing, SEQUENCES).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kind", "rows"), [("expert", SEQUENCES), ("batch", 1)])
def test_expert_loss_counts_the_experts_that_were_selected(kind, rows):
    routing = random_routing(bias=5.0)
    expected = np.mean([by_hand(*both) for both in zip(*parts(routing, rows), strict=True)])
    assert auxiliary_loss(kind, routing, SEQUENCES).item() == pytest.approx(expected, rel=1e-6)


def test_an_even_load_costs_one_and_gradient_reaches_the_scores():
    routing = random_routing()
    even = torch.full((EXPERTS, EXPERTS), 0.5, requires_grad=True)
    experts = torch.stack((torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS), 1)
    assert auxiliary_loss("expert", Routing(even, experts, even[:, :2]), 1).item() == pytest.approx(1.0)
    auxiliary_loss("sequence", routing, SEQUENCES).backward()
    assert routing.scores.grad.abs().sum() > 0


def group_losses_by_hand(scores, experts, groups, kept):
    """Equations 26 to 31 of DeepSeek-V2 for one sequence, device by device."""
    tokens, num_experts = scores.shape
    size, computed, sent = num_experts // groups, 0.0, 0.0
    for group in range(groups):
        own = range(group * size, (group + 1) * size)
        frequency = [num_experts / (CHOSEN * tokens) * sum(one in row for row in experts.tolist()) for one in own]
        probability = sum(np.mean([row[one] / row.sum() for row in scores]) for one in own)
        reached = sum(any(one in own for one in row) for row in experts.tolist())
        computed += np.mean(frequency) * probability
        sent += groups / (kept * tokens) * reached * probability
    return computed, sent


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (2, 1), (8, 2)])
def test_group_losses_are_those_between_the_devices_of_deepseek_v2(groups, kept):
    routing = random_routing(bias=1.0)
    expected = [group_losses_by_hand(*both, groups, kept) for both in zip(*parts(routing, SEQUENCES), strict=True)]
    found = [one.item() for one in group_losses(routing, SEQUENCES, groups, kept)]
    assert found == pytest.approx(np.mean(expected, axis=0).tolist(), rel=1e-6)


def test_groups_that_compute_and_are_sent_the_same_cost_one_and_gradient_reaches_the_scores():
    even = torch.full((EXPERTS, EXPERTS), 0.5, requires_grad=True)
    experts = torch.stack((torch.arange(EXPERTS), (torch.arange(EXPERTS) + 4) % EXPERTS), 1)  # two groups a token
    assert [one.item() for one in group_losses(Routing(even, experts, even[:, :2]), 1, 4, 2)] == pytest.approx([1, 1])
    routing = random_routing()
    sum(group_losses(routing, SEQUENCES, 4, 2)).backward()
    assert routing.scores.grad.abs().sum() > 0


def test_losses_between_groups_are_refused_where_they_could_not_change():
    with pytest.raises(ConfigError, match=r"balance.device_alpha is 0.05; it balances groups of experts, and model"):
        small_run(model=small_model(n_group=1, topk_group=1), balance=BalanceConfig(device_alpha=0.05))
    with pytest.raises(ConfigError, match=r"a token reaches few of them, and model.topk_group is all 4"):
        small_run(model=small_model(topk_group=4), balance=BalanceConfig(communication_alpha=0.02))


def test_loads_count_every_choice_and_max_violation_is_the_papers():
    loads = count_loads(torch.tensor([[0, 1], [0, 2], [0, 1]]), 4)
    assert loads.tolist() == [3, 2, 1, 0]
    assert max_violation(torch.stack((loads, torch.ones(4)))).tolist() == [1.0, 0.0]


def test_the_sign_rule_moves_overloaded_experts_down_and_underloaded_ones_up():
    bias = {5: torch.zeros(4)}
    move_biases(bias, {5: torch.tensor([10, 6, 2, 6])}, BalanceConfig(bias_rule="sign"), 0.001)
    assert bias[5].tolist() == pytest.approx([-0.001, 0.0, 0.001, 0.0])


def test_the_centred_rule_keeps_the_mean_and_the_differences_of_the_sign_rule():
    loads = {0: torch.tensor([10, 1, 1, 0])}
    plain, centred = {0: torch.zeros(4)}, {0: torch.zeros(4)}
    move_biases(plain, loads, BalanceConfig(bias_rule="sign"), 0.5)
    move_biases(centred, loads, BalanceConfig(bias_rule="centred_sign"), 0.5)
    assert plain[0].tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert centred[0].mean().item() == pytest.approx(0.0)
    assert (centred[0] - centred[0][0]).tolist() == (plain[0] - plain[0][0]).tolist()


def test_no_rule_and_no_speed_leave_the_bias_alone():
    bias = {0: torch.zeros(2)}
    move_biases(bias, {0: torch.tensor([5, 0])}, BalanceConfig(bias_rule="none"), 1.0)
    move_biases(bias, {0: torch.tensor([5, 0])}, BalanceConfig(), 0.0)
    assert bias[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "speed"), [(512, 1e-4), (51_200, 1e-3), (4 * 51_200, 1e-3), (2_048, 2e-4), (15_360 * 4_096, 1e-3)]
)
def test_speed_shrinks_with_the_root_of_small_updates(tokens, speed):
    assert scaled_speed(1e-3, tokens, 51_200) == pytest.approx(speed)


def test_the_bias_alone_brings_a_skewed_router_into_balance():
    config = small_model(n_group=1, topk_group=1)
    stream = torch.Generator().manual_seed(0)
    skew = torch.linspace(-1.5, 1.5, EXPERTS)
    bias = {1: torch.zeros(EXPERTS)}
    violations = []
    for _ in range(300):
        chosen = route(torch.randn(512, EXPERTS, generator=stream) + skew, bias[1], config)
        loads = {1: count_loads(chosen.experts, EXPERTS)}
        violations.append(max_violation(loads[1][None]).item())
        move_biases(bias, loads, BalanceConfig(), 2e-3)
    assert violations[0] > 1.0
    assert np.mean(violations[-20:]) < 0.2


def test_every_expert_layer_has_its_bias_prediction_layers_too():
    model = LanguageModel(small_model())
    initialise(model, 0)
    assert sorted(routing_biases(model)) == [1, 2]
    routing_biases(model)[2].add_(1.0)
    assert model.state_dict()["model.layers.2.mlp.gate.e_score_correction_bias"].tolist() == [1.0] * 8

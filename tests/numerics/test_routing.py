"""The reference router on an example worked by hand, and its rules one by one."""

from __future__ import annotations

import pytest
import torch

from benthic.numerics.reference.routing import route
from tests.model.configs import EXPERTS, tiny

LOGITS = torch.tensor([[1, -1, 2, 2, 0.5, 0, -0.5, 0.25]])
BIAS = torch.tensor([0, 0, -0.6, -0.6, 0.3, -0.3, 0, 0.1])
WORKED = tiny(**EXPERTS, n_group=4, topk_group=2, routed_scaling_factor=2.5)


def test_the_worked_example_of_v3():
    scores, experts, weights = route(LOGITS, BIAS, WORKED)
    expected = [0.731059, 0.268941, 0.880797, 0.880797, 0.622459, 0.5, 0.377541, 0.562177]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert experts.tolist() == [[4, 7, 6]]
    assert weights[0].tolist() == pytest.approx([0.996141, 0.899669, 0.604190], abs=1e-6)
    assert float(weights.sum()) == pytest.approx(2.5)


def test_v2_scores_a_group_by_its_best_expert():
    config = WORKED.replace(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    _, experts, weights = route(LOGITS, None, config)
    # Groups {0, 1} (best logit 1) and {2, 3} (2): by the sum of two best, {4, 5} would beat the first.
    assert sorted(experts[0].tolist()) == [0, 2, 3]
    softmax = LOGITS.softmax(-1)[0]
    assert weights[0].tolist() == pytest.approx([2.5 * float(softmax[e]) for e in experts[0]])


def test_negative_biases_do_not_bring_masked_groups_back():
    _, experts, _ = route(LOGITS, BIAS - 2, WORKED)
    assert experts.tolist() == [[4, 7, 6]]

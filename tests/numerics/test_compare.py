"""The comparison finds what differs and says where."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import NumericsError
from benthic.numerics.compare import TOLERANCES, assert_close


def test_equal_tensors_agree_infinities_included():
    x = torch.tensor([1.0, -torch.inf, 3.0])
    assert_close(x, x.clone(), "operation_fp32")
    assert_close(torch.empty(0), torch.empty(0), "operation_fp32")


def test_the_worst_element_is_named():
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[0, 1], actual[1, 2] = 1e-4, 1.0
    with pytest.raises(NumericsError, match=r"logits\[1, 2\] is 1, expected 0: 5e\+04 times what operation_fp32"):
        assert_close(actual, expected, "operation_fp32", "logits")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_non_finite_value_never_agrees(wrong):
    with pytest.raises(NumericsError):
        assert_close(torch.tensor([wrong]), torch.tensor([1.0]), "model_bf16")
    with pytest.raises(NumericsError):
        assert_close(torch.tensor([1.0]), torch.tensor([wrong]), "model_bf16")


def test_shapes_must_agree():
    with pytest.raises(NumericsError, match=r"has shape \[2\], expected \[2, 1\]"):
        assert_close(torch.ones(2), torch.ones(2, 1), "operation_fp32")


def test_tolerances_are_ordered_by_precision():
    assert TOLERANCES["operation_fp32"].absolute < TOLERANCES["model_fp32"].absolute < TOLERANCES["model_bf16"].absolute

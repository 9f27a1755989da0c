"""Shapes written in signatures are checked in tests, and cost nothing outside them."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from benthic import ops
from benthic.config import ModelConfig
from benthic.model import LanguageModel
from benthic.numerics.reference import norm as reference


def test_an_operation_refuses_a_wrong_shape():
    with pytest.raises(TypeCheckError, match="parameter 'weight'"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(1), 1e-6)


def test_a_reference_refuses_a_wrong_shape():
    with pytest.raises(TypeCheckError, match="parameter 'weight'"):
        reference.rms_norm(torch.ones(2, 3), torch.ones(1), 1e-6)


def test_an_operation_refuses_a_wrong_dtype():
    with pytest.raises(TypeCheckError, match="parameter 'targets'"):
        ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int32))


def test_the_model_refuses_a_wrong_shape():
    config = ModelConfig.from_pretrained("deepseek-v3").replace(num_hidden_layers=1, num_nextn_predict_layers=0)
    with pytest.raises(TypeCheckError, match="parameter 'input_ids'"):
        LanguageModel(config, device="meta")(torch.zeros(3, dtype=torch.int64))


def test_results_are_checked_too(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "silu", lambda gate: gate[None])
    with pytest.raises(TypeCheckError, match="return value"):
        ops.swiglu(torch.ones(3), torch.ones(3))


def test_outside_tests_nothing_is_checked():
    code = """
import sys, torch
import benthic.model, benthic.numerics.compare, benthic.numerics.reference.model
from benthic import ops
assert ops.rms_norm(torch.ones(2, 3), torch.ones(1, 3), 1e-6).shape == (2, 3)
for function in (ops.routed_experts, ops.attention, benthic.model.LanguageModel.forward):
    assert not hasattr(function, "__wrapped__"), function
assert not {"beartype", "typeguard"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Rotary frequencies against the published vector and transformers; rotations against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benthic.config import ModelConfig
from benthic.config.model import RopeParameters
from benthic.numerics.compare import assert_close
from benthic.numerics.reference.rotary import inverse_frequencies, rotary, rotation

# DeepSeek-V3: theta 10000, YaRN factor 40 over 4096 positions, 64 rotating channels.
V3_FREQUENCIES = """1.0, 0.7498942, 0.5623413, 0.4216965, 0.3162278, 0.2371374, 0.1778279, 0.1333521, 0.1, 0.07498942,
0.05623413, 0.03900693, 0.02687936, 0.01837814, 0.01244796, 0.008334509, 0.0055, 0.003561997, 0.002249365, 0.001370513,
0.0007905694, 0.0004149904, 0.0001778279, 3.333803e-05, 2.5e-05, 1.874735e-05, 1.405853e-05, 1.054241e-05, 7.905694e-06,
5.928434e-06, 4.445698e-06, 3.333804e-06"""


def test_v3_frequencies_are_the_published_ones():
    rope = ModelConfig.from_pretrained("deepseek-v3").rope_parameters
    expected = torch.tensor([float(value) for value in V3_FREQUENCIES.split(",")])
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)


def test_kimi_frequencies_step_from_whole_to_one_thirty_second():
    rope = ModelConfig.from_pretrained("kimi-k2").rope_parameters
    base = 50000 ** -(torch.arange(32) / 32)
    expected = torch.where(torch.arange(32) <= 19, base, base / 32)
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "high_freq_factor": 4.0},
    ],
)
def test_extended_frequencies_and_gain_equal_those_of_transformers(values):
    rope = RopeParameters(**values)
    parameters = rope.model_dump(exclude_none=True)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=2048, rope_parameters=parameters
    )
    expected, gain = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, "cpu")
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)
    assert rope.rotation_gain == pytest.approx(gain)


def test_a_pair_turns_by_position_times_frequency():
    rope = RopeParameters()
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation(rope, 8, torch.arange(5))
    turned = rotary(x, cos, sin, interleaved=True)
    angle = 3 * 10000 ** (-2 / 8)
    expected = complex(x[0, 3, 1, 2], x[0, 3, 1, 3]) * complex(math.cos(angle), math.sin(angle))
    assert turned[0, 3, 1, 2:4].tolist() == pytest.approx([expected.real, expected.imag], abs=1e-5)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert_close(rotary(x[..., order], cos, sin, interleaved=False), turned[..., order], "operation_fp32")

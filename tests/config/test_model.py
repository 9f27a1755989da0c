"""ModelConfig: what it accepts, what it refuses and with which words."""

import math

import pytest

from benthic.config import ModelConfig
from benthic.config.published import preset_names
from benthic.errors import ConfigError

V3 = ModelConfig.from_pretrained("deepseek-v3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 8, "n_group": 8, "num_experts_per_tok": 2}, "scored by its two best"),
        ({"n_routed_experts": 10, "n_group": 4}, "n_group (4) must divide it"),
        (
            {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 5},
            "num_experts_per_tok is 5, but 1 kept groups of 2 experts offer only 2",
        ),
        ({"topk_group": 9}, "topk_group is 9; it can be at most n_group (8)"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; rotation works on pairs"),
        ({"num_key_value_heads": 8}, "latent attention expands a key for each of the 128 heads"),
        ({"hidden_size": 0}, "hidden_size: Input should be greater than 0 (given 0)"),
        ({"hidden_size": -3}, "hidden_size: Input should be greater than 0 (given -3)"),
        ({"qk_nope_head_dim": None}, "qk_nope_head_dim is required when kv_lora_rank is set"),
        ({"kv_lora_rank": None}, "q_lora_rank belongs to latent attention"),
        ({"scoring_func": "tanh"}, "scoring_func: Input should be 'sigmoid' or 'softmax' (given 'tanh')"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is required"),
        ({"qk_norm": True}, "qk_norm does not apply to latent attention"),
    ],
)
def test_an_impossible_model_is_refused_with_its_reason(changes, message):
    with pytest.raises(ConfigError) as caught:
        V3.replace(**changes)
    assert message in str(caught.value)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        V3.replace(hiden_size=3)
    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        ModelConfig(vocab_sise=3)


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        V3.hidden_size = 1


def test_softmax_scale_carries_the_yarn_correction_at_every_length():
    # 192^-0.5 times (0.1 ln 40 + 1)^2; the value DeepSeek's inference code arrives at.
    assert V3.softmax_scale == pytest.approx(0.1352337789, abs=1e-10)
    assert ModelConfig.from_pretrained("deepseek-v2-lite").softmax_scale == pytest.approx(0.1147213868, abs=1e-10)
    assert ModelConfig.from_pretrained("kimi-k2").softmax_scale == pytest.approx(0.1308608000, abs=1e-10)
    assert ModelConfig.from_pretrained("moonlight-16b-a3b").softmax_scale == pytest.approx(192**-0.5)
    assert ModelConfig.from_pretrained("llama-3.1-405b").softmax_scale == pytest.approx(128**-0.5)


def test_no_released_model_scales_cos_and_sin():
    for name in preset_names():
        assert ModelConfig.from_pretrained(name).rope_parameters.rotation_gain == 1.0


def test_yarn_without_mscale_scales_cos_and_sin():
    rope = V3.rope_parameters.replace(mscale=None, mscale_all_dim=None)
    assert rope.rotation_gain == pytest.approx(0.1 * math.log(40) + 1)
    assert rope.softmax_gain == 1.0


@pytest.mark.parametrize(
    ("name", "kind", "cache_width"),
    [
        ("deepseek-v3", "mla", 576),
        ("olmo2-7b", "mha", 2 * 32 * 128),
        ("llama-3.1-405b", "gqa", 2 * 8 * 128),
    ],
)
def test_attention_kind_follows_from_the_sizes(name, kind, cache_width):
    config = ModelConfig.from_pretrained(name)
    assert config.attention_kind == kind
    assert config.cache_width == cache_width


def test_one_key_value_head_is_mqa():
    assert ModelConfig.from_pretrained("llama-3.1-405b").replace(num_key_value_heads=1).attention_kind == "mqa"


def test_which_layers_route():
    assert [V3.is_expert_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert V3.num_expert_layers == 58
    every_second = V3.replace(moe_layer_freq=2)
    assert [every_second.is_expert_layer(layer) for layer in (3, 4, 5)] == [False, True, False]
    assert not ModelConfig.from_pretrained("olmo2-7b").is_expert_layer(5)

"""Published config.json files in both spellings, there and back, and against transformers."""

import json
import re

import pytest

from benthic.config import ModelConfig
from benthic.config.published import (
    PRESETS,
    config_from_published,
    config_to_published,
    preset_names,
    published_model_type,
    read_json,
)
from benthic.errors import ConfigError


def published(name):
    return json.loads((PRESETS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", preset_names())
def test_what_is_written_reads_back_equal(name):
    config = ModelConfig.from_pretrained(name)
    assert config_from_published(json.loads(json.dumps(config_to_published(config)))) == config


@pytest.mark.parametrize("name", [name for name in preset_names() if "moe-16b" not in name])
def test_transformers_reads_what_is_written(name):
    from transformers import CONFIG_MAPPING

    config = ModelConfig.from_pretrained(name)
    data = config_to_published(config)
    theirs = CONFIG_MAPPING[data["model_type"]].from_dict(data)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "num_attention_heads"):
        assert getattr(theirs, key) == getattr(config, key)
    assert theirs.rope_parameters["rope_theta"] == config.rope_parameters.rope_theta
    assert theirs.rope_parameters["rope_type"] == config.rope_parameters.rope_type
    if config.kv_lora_rank:
        assert theirs.q_lora_rank == config.q_lora_rank
        assert theirs.kv_lora_rank == config.kv_lora_rank


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "olmo2-7b", "llama-3.1-405b", "qwen2.5-72b"])
def test_the_spelling_transformers_five_writes_reads_the_same(name, tmp_path):
    from transformers import CONFIG_MAPPING

    old = published(name)
    theirs = CONFIG_MAPPING[old["model_type"]].from_dict(dict(old))
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_pretrained(tmp_path)
    # transformers drops what its own code ignores, quantisation among it when no quantiser is loaded.
    same = {"quantization_config": None, "aux_loss_alpha": None, "seq_aux": None}
    expected = ModelConfig.from_pretrained(name)
    assert ours.replace(**same) == expected.replace(**same)


def test_the_newer_name_of_the_prediction_layers_is_read():
    data = published("deepseek-v3")
    data["num_mtp_layers"] = data.pop("num_nextn_predict_layers")
    assert config_from_published(data).num_nextn_predict_layers == 1


def test_a_file_without_router_keys_gets_its_family_s_router():
    data = published("deepseek-v3")
    for key in ("scoring_func", "topk_method", "norm_topk_prob"):
        del data[key]
    assert config_from_published(data) == ModelConfig.from_pretrained("deepseek-v3")
    lite = published("deepseek-v2-lite")
    del lite["topk_method"], lite["scoring_func"]
    assert config_from_published(lite) == ModelConfig.from_pretrained("deepseek-v2-lite")


def test_zero_query_compression_means_none():
    data = published("deepseek-v2-lite") | {"q_lora_rank": 0}
    assert config_from_published(data).q_lora_rank is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', which benthic does not hold"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "missing: hidden_size"),
        ({"kv_lora_rank": None, "vocab_size": None}, "missing: vocab_size, kv_lora_rank"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; benthic holds models with hidden_act 'silu' only"),
        ({"index_topk": 2048}, "unknown key 'index_topk'"),
        ({"num_hiden_layers": 3}, "did you mean 'num_hidden_layers'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object or null"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Input should be greater than 0"),
    ],
)
def test_a_config_that_benthic_cannot_hold_is_refused_by_field(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_from_published(published("deepseek-v3") | changes, "somewhere/config.json")
    assert message in str(caught.value)
    assert "somewhere/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "deepseek-v3",
            "q_lora_rank n_routed_experts n_shared_experts num_experts_per_tok first_k_dense_replace n_group",
        ),
        ("kimi-k2", "topk_group routed_scaling_factor max_position_embeddings"),
        ("deepseek-v2-lite", "q_lora_rank num_experts_per_tok first_k_dense_replace"),
        ("deepseek-moe-16b", "n_routed_experts num_experts_per_tok first_k_dense_replace"),
        ("olmo2-7b", "max_position_embeddings"),
    ],
)
def test_a_size_that_is_not_stated_is_never_guessed(name, keys):
    for key in keys.split():
        data = published(name)
        del data[key]
        with pytest.raises(ConfigError, match=f"missing: {key}"):
            config_from_published(data)


def test_a_v2_router_that_readers_disagree_about_is_refused():
    data = published("deepseek-v2") | {"norm_topk_prob": True}
    with pytest.raises(ConfigError, match=r"norm_topk_prob is true beside routed_scaling_factor 16\.0"):
        config_from_published(data)
    assert config_from_published(data | {"routed_scaling_factor": 1.0}).norm_topk_prob


def test_unknown_names_and_broken_files_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'deepseek-v3'"):
        ModelConfig.from_pretrained("deepsek-v3")
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, not a JSON object"):
        ModelConfig.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["deepseek_v3"]}, "model_type is ['deepseek_v3'], which benthic does not hold"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number above 0"),
        ({"max_position_embeddings": {}}, "max_position_embeddings is {}; it must be a whole number above 0"),
        ({"rope_scaling": []}, "rope_scaling is []; it must be an object or null"),
        ({"rope_theta": 0}, "rope_theta: Input should be greater than 0 (given 0)"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"layer_types": 3}, "layer_types is 3; benthic holds full_attention layers only"),
        ({"vocab_size": True}, "vocab_size: Input should be a number, not true or false (given True)"),
        ({"vocab_size": 10**30}, "vocab_size: Input should be less than"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: Input should be less than or equal to 10000"),
        ({"num_nextn_predict_layers": 10**12}, "num_nextn_predict_layers: Input should be less than or equal to 10000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Input should be a finite number (given inf)"),
    ],
)
def test_values_of_any_type_are_refused_by_name(changes, message):
    data = read_json(PRESETS / "deepseek-v3.json") | changes
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_published(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' * 9000, "is not usable JSON: it is nested too deeply"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        ('{"vocab_size": 1, "vocab_size": 2}', "is not valid JSON: key 'vocab_size' is given twice"),
    ],
)
def test_hostile_json_is_a_config_error(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_pretrained(tmp_path)


def test_a_name_too_long_for_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"no model is named 'aaaa.*: 5000 characters are too many for a file"):
        ModelConfig.from_pretrained("a" * 5000)


def test_a_hub_name_finds_its_preset():
    assert ModelConfig.from_pretrained("deepseek-ai/DeepSeek-V3") == ModelConfig.from_pretrained("deepseek-v3")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "deepseek_v3"),
        ({"scoring_func": "softmax"}, "benthic"),
        ({"n_shared_experts": 0}, "benthic"),
        ({"moe_layer_freq": 2}, "benthic"),
        (
            {
                "scoring_func": "softmax",
                "topk_method": "group_limited_greedy",
                "norm_topk_prob": False,
                "num_nextn_predict_layers": 0,
            },
            "deepseek_v2",
        ),
    ],
)
def test_a_model_is_written_as_a_published_architecture_only_when_it_computes_the_same(changes, expected):
    config = ModelConfig.from_pretrained("deepseek-v3").replace(**changes)
    assert published_model_type(config) == expected
    assert config_from_published(config_to_published(config)) == config


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_the_gain_of_latent_attention_is_written_with_every_kind_of_rotation(kind):
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 4096, "mscale_all_dim": 0.7}
    config = ModelConfig.from_pretrained("deepseek-v3").replace(rope_parameters=rope)
    assert config_from_published(config_to_published(config)).softmax_scale == config.softmax_scale


def test_fp8_configs_of_transformers_are_read_as_the_released_ones():
    released = published("deepseek-v3")
    theirs = released["quantization_config"] | {
        "scale_fmt": "float",
        "dequantize": False,
        "modules_to_not_convert": ["lm_head"],
        "modules_to_convert": None,
        "expert_dtype": "fp8",
    }
    read = config_from_published(released | {"quantization_config": theirs})
    assert read == config_from_published(released)


def test_fp4_experts_are_refused():
    released = published("deepseek-v3")
    theirs = released["quantization_config"] | {"expert_dtype": "fp4"}
    with pytest.raises(ConfigError, match="expert_dtype"):
        config_from_published(released | {"quantization_config": theirs})

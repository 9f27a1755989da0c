"""The cache: the V2 paper's table, the four kinds of attention side by side, and what tensor parallelism divides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.kv_cache import (
    CACHE_BITS,
    bytes_per_token_if,
    bytes_per_token_of_rank,
    cache_bytes_per_layer,
    cache_bytes_per_token,
    compared_groups,
    elements_per_layer,
    elements_per_token,
    expanded_elements_per_token,
)
from tests.plan.configs import SMALL, configs, drawn

KINDS = ["mha", "gqa", "mqa", "mla"]


def preset(name):
    return ModelConfig.from_pretrained(name)


def test_the_table_of_the_v2_paper():
    assert elements_per_token(preset("deepseek-v2-lite"), "mha") == 110_592
    assert elements_per_token(preset("deepseek-v2-lite")) == 15_552
    assert elements_per_token(preset("deepseek-v2")) == 34_560


def test_published_bytes_a_token():
    assert cache_bytes_per_token(preset("deepseek-v3")) == 70_272
    assert cache_bytes_per_token(preset("llama-3.1-405b")) == 516_096
    assert cache_bytes_per_token(preset("qwen2.5-72b")) == 327_680


def test_the_93_percent_of_the_v2_paper_include_a_6_bit_cache():
    own, before = cache_bytes_per_token(preset("deepseek-v2"), "int6"), cache_bytes_per_token(preset("deepseek-67b"))
    assert round(100 * (1 - own / before), 1) == 93.3


def test_v3_with_each_attention():
    found = bytes_per_token_if(preset("deepseek-v3"))
    assert found == {"mha": 2 * 128 * 256 * 61, "gqa": 2 * 8 * 256 * 61, "mqa": 2 * 256 * 61, "mla": 70_272}
    assert expanded_elements_per_token(preset("deepseek-v3")) == 128 * (192 + 128) * 61


def test_a_model_without_a_latent_is_compared_with_the_papers_choice_of_one():
    assert elements_per_token(preset("olmo2-7b"), "mla") == (4 * 128 + 64) * 32


def test_a_grouped_model_keeps_its_own_groups():
    config = preset("qwen2.5-72b")
    assert compared_groups(config) == 8
    assert bytes_per_token_if(config)["gqa"] == cache_bytes_per_token(config)


def test_groups_divide_the_heads():
    assert compared_groups(SMALL["v3"]) == 4
    assert compared_groups(preset("olmo2-13b")) == 8
    assert compared_groups(SMALL["v3"].replace(num_attention_heads=9, num_key_value_heads=9)) == 3


def test_the_mtp_layer_has_a_cache_of_its_own():
    config = preset("deepseek-v3")
    assert cache_bytes_per_token(config, include_mtp=True) - cache_bytes_per_token(config) == 1152


def test_the_format_of_flashmla_holds_scales_and_a_16_bit_rotary_key():
    assert cache_bytes_per_layer(preset("deepseek-v3"), "fp8_ds_mla") == 656
    assert bytes_per_token_if(preset("deepseek-v3"), "fp8_ds_mla")["mla"] == 40_016


def test_the_latent_is_not_divided_by_tensor_parallelism():
    config = preset("deepseek-v3")
    assert bytes_per_token_of_rank(config, 8) == 70_272


def test_key_value_heads_are_divided_until_one_is_left():
    config = preset("llama-3.1-405b")
    assert bytes_per_token_of_rank(config, 4) == 516_096 / 4
    assert bytes_per_token_of_rank(config, 8) == bytes_per_token_of_rank(config, 16) == 516_096 / 8


@drawn
@given(configs())
def test_a_layer_s_cache_is_as_wide_as_the_engine_makes_it(config):
    assert elements_per_layer(config) == config.cache_width


@drawn
@given(configs(), st.sampled_from(KINDS))
def test_fewer_bits_take_less_in_proportion(config, kind):
    for name, bits in CACHE_BITS.items():
        size = cache_bytes_per_token(config, name, kind)
        assert size == pytest.approx(cache_bytes_per_token(config, "fp32", kind) * bits / 32)


@drawn
@given(configs())
def test_sharing_heads_never_costs_more(config):
    mha, gqa, mqa = (elements_per_token(config, kind) for kind in ("mha", "gqa", "mqa"))
    assert mha >= gqa >= mqa > 0


@drawn
@given(configs(), st.sampled_from(KINDS))
def test_a_layer_more_is_a_layer_more(config, kind):
    deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1)
    one = elements_per_token(config, kind) / config.num_hidden_layers
    assert elements_per_token(deeper, kind) - elements_per_token(config, kind) == one


@drawn
@given(configs())
def test_the_cache_depends_on_neither_experts_nor_vocabulary(config):
    other = config.replace(vocab_size=2 * config.vocab_size, intermediate_size=7)
    assert elements_per_token(other) == elements_per_token(config)


def test_refusals_name_the_value_and_what_is_allowed():
    with pytest.raises(ConfigError, match=r"unknown cache format 'fp9'\nhint: did you mean 'fp8'"):
        cache_bytes_per_token(SMALL["v3"], "fp9")
    with pytest.raises(ConfigError, match=r"'fp8_ds_mla' is for latent attention; this is mha"):
        cache_bytes_per_token(SMALL["dense mha"], "fp8_ds_mla")
    with pytest.raises(ConfigError, match=r"size is 3; it must divide num_attention_heads \(4\)"):
        bytes_per_token_of_rank(SMALL["v3"], 3)

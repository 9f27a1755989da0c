"""Recipes: valid, complete in YAML, and the demo has every part of DeepSeek-V3."""

import pytest

from benthic.config.model import ModelConfig
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError
from benthic.recipes import RECIPES, find_recipe
from benthic.train.schedule import planned_tokens


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_yaml(name, tmp_path):
    config = find_recipe(name)()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config
    assert planned_tokens(config) > 0


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="'tinny' is neither a recipe nor a config file") as caught:
        find_recipe("tinny")
    assert caught.value.hint == "did you mean 'tiny'?"


def test_the_demos_model_has_every_part_of_v3():
    model, v3 = find_recipe("demo")().model, ModelConfig.from_pretrained("deepseek-v3")
    assert model == ModelConfig.from_pretrained("tiny")
    for part in "attention_kind scoring_func topk_method norm_topk_prob has_routing_bias rope_interleave".split():
        assert getattr(model, part) == getattr(v3, part)
    assert model.q_lora_rank
    assert model.n_shared_experts == model.num_nextn_predict_layers == 1
    assert 0 < model.first_k_dense_replace < model.num_hidden_layers
    assert 1 < model.topk_group < model.n_group

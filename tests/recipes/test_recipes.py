"""Recipes: valid, complete in YAML, and the demo has every part of DeepSeek-V3."""

import pytest

from benthic.config.model import ModelConfig
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError
from benthic.parallel.mesh import require_supported
from benthic.plan.devices import find_device
from benthic.plan.memory import training_memory
from benthic.recipes import RECIPES, find_recipe
from benthic.train.fit import training_of
from benthic.train.schedule import Place, planned_tokens, value


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


@pytest.mark.parametrize(("name", "tokens"), [("v2-lite", 5.7e12), ("deepseek-v3", 14.8e12)])
def test_a_published_run_reads_as_many_tokens_as_its_report_says(name, tokens):
    assert planned_tokens(find_recipe(name)()) == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize("name", ["v2-lite", "deepseek-v3"])
def test_a_published_run_divides_over_its_ranks_and_the_trainer_can_do_its_layout(name):
    config = find_recipe(name)()
    layout = config.parallel
    require_supported(layout, config.model, layout.world)
    for share in (config.batch.sequences.start, 1.0):
        layout.check_batch(int(config.batch.sequences.peak * share), config.batch.micro_sequences, 4096)


def test_deepseek_v3_fits_the_gpus_of_its_layout():
    config = find_recipe("deepseek-v3")()
    h100 = find_device("h100")
    assert training_memory(config.model, training_of(config, "float8"), config.parallel, device=h100).total < 80e9


def test_the_learning_rate_of_deepseek_v3_falls_as_the_report_says():
    rate = find_recipe("deepseek-v3")().optimizer.learning_rate
    steps = 242_782
    found = [value(rate, Place(step, int(tokens), steps)) for step, tokens in
             ((1_000, 1e9), (50_000, 3e12), (200_000, 14.3e12), (240_000, 14.5e12), (242_000, 14.7e12))]  # fmt: skip
    assert found == pytest.approx([1.1e-4, 2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6])

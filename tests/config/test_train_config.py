"""TrainConfig: frozen, complete, refusing what cannot be."""

import pytest

from benthic.config.train import BatchConfig, CheckpointConfig, OptimizerConfig, Schedule, TrainConfig
from benthic.errors import ConfigError
from tests.train.small import small_model, small_run


def test_every_setting_survives_yaml(tmp_path):
    config = small_run(sampling={"prompts": ("a: b", "# c\n")}, seed=7)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config


def test_a_plain_number_is_a_schedule_that_never_changes():
    assert OptimizerConfig(learning_rate=3e-4).learning_rate == Schedule(peak=3e-4)
    assert OptimizerConfig(learning_rate="1e-3").learning_rate == Schedule(peak=1e-3)
    with pytest.raises(ConfigError, match="learning_rate"):
        OptimizerConfig(learning_rate="fast")


def test_a_model_may_be_named_by_its_preset():
    config = small_run(model="deepseek-v3", data=small_run().data)
    assert config.model.hidden_size == 7168


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": small_run().data.replace(sequence_length=65)}, "data.sequence_length is 65"),
        ({"data": small_run().data.replace(sequence_length=1)}, "1 prediction layers need more"),
        (
            {"data": small_run().data.replace(vocab_size=1000)},
            "but model.vocab_size is only 320",
        ),
        ({"model": small_model(num_experts_per_tok=1)}, "the router gets no gradient"),
        ({"start_from": "runs/demo/model"}, "start_from needs data.tokenizer"),
        ({"name": "../elsewhere"}, "name: String should match pattern"),
        (
            {"checkpoint": CheckpointConfig(export_average=True), "optimizer": OptimizerConfig()},
            "optimizer.ema_decay",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_run(**changes)


def test_one_chosen_expert_with_its_own_score_as_weight_trains():
    model = small_model(num_experts_per_tok=1, norm_topk_prob=False)
    assert small_run(model=model).model.num_experts_per_tok == 1


def test_sequences_are_whole_micro_batches():
    with pytest.raises(ConfigError, match=r"sequences is 6 at its peak; .* micro_sequences \(4\)"):
        BatchConfig(sequences=6, micro_sequences=4)


def test_a_config_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        small_run().steps = 3


def test_dense_models_need_no_settings_of_their_own():
    assert small_run(model=small_model(n_routed_experts=None, n_shared_experts=0)).model.num_expert_layers == 0

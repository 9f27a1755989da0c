"""The manifest against published counts, tensor names and shapes."""

import pytest

from benthic.config import ModelConfig
from benthic.config.manifest import parameters, stored_tensors
from benthic.config.published import preset_names


def main_rows(config):
    return [row for row in parameters(config) if row.layer is None or row.layer < config.num_hidden_layers]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-r1", 671_026_419_200),
        ("deepseek-v3.1", 671_026_419_200),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v2-lite", 15_706_484_224),
        ("moonlight-16b-a3b", 15_960_110_208),
        ("kimi-k2", 1_026_408_232_448),
    ],
)
def test_totals_equal_the_published_models(name, total):
    assert sum(row.size for row in main_rows(ModelConfig.from_pretrained(name))) == total


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-67b", 67.425),
        ("deepseek-moe-16b", 16.376),
        ("olmo2-7b", 7.299),
        ("olmo2-13b", 13.716),
        ("llama-3.1-405b", 405.853),
        ("qwen2.5-72b", 72.706),
    ],
)
def test_dense_and_older_totals_equal_the_published_billions(name, billions):
    total = sum(row.size for row in main_rows(ModelConfig.from_pretrained(name)))
    assert round(total / 1e9, 3) == billions


def test_deepseek_v3_on_disk():
    config = ModelConfig.from_pretrained("deepseek-v3")
    stored = {row.name: row for row in stored_tensors(config)}
    assert len(stored) == 46_183
    assert sum(row.source.fp8 for row in stored.values()) == 45_808
    assert sum(row.size for row in stored.values()) == 684_489_845_504
    shapes = {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.3.mlp.experts.255.up_proj.weight": (2048, 7168),
        "model.layers.3.mlp.experts.0.down_proj.weight": (7168, 2048),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.shared_head.norm.weight": (7168,),
    }
    assert {name: stored[name].shape for name in shapes} == shapes
    assert not stored["model.layers.61.eh_proj.weight"].source.fp8
    assert not stored["model.layers.3.mlp.gate.weight"].source.fp8


def test_the_prediction_layer_holds_what_the_weights_notes_say():
    config = ModelConfig.from_pretrained("deepseek-v3")
    unique = sum(row.size for row in parameters(config) if row.layer == 61)
    assert unique == 11_610_068_224
    assert unique + 2 * 129280 * 7168 == 13_463_426_304


@pytest.mark.parametrize("name", preset_names())
def test_names_are_unique_and_stored_tensors_cover_every_parameter_once(name):
    config = ModelConfig.from_pretrained(name)
    rows = list(parameters(config))
    assert len({row.name for row in rows}) == len(rows)
    covered = {}
    for stored in stored_tensors(config):
        if not stored.duplicate:
            covered[stored.source.name] = covered.get(stored.source.name, 0) + stored.size
    assert covered == {row.name: row.size for row in rows}


def test_tied_embeddings_have_no_head():
    config = ModelConfig.from_pretrained("qwen2.5-72b").replace(tie_word_embeddings=True)
    assert "lm_head.weight" not in {row.name for row in parameters(config)}

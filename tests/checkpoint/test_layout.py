"""The manifest against a folder: every fault in one message, and what is allowed beside the manifest."""

import logging

import pytest

from benthic.checkpoint.folder import Entry
from benthic.checkpoint.layout import find_faults, refuse_faults, without_absent_predictions
from benthic.config.manifest import stored_tensors
from benthic.errors import CheckpointError
from tests.checkpoint.folders import TINY

PREDICTION = "model.layers.2."


def complete(config=TINY, dtype="BF16"):
    return {row.name: Entry(row.name, dtype, row.shape, "model.safetensors") for row in stored_tensors(config)}


def quantised(name, scale_shape, scale_dtype="F32"):
    entries = complete()
    entries[name] = Entry(name, "F8_E4M3", entries[name].shape, "a.safetensors")
    if scale_shape:
        entries[name + "_scale_inv"] = Entry(name + "_scale_inv", scale_dtype, scale_shape, "b.safetensors")
    return entries


def test_a_complete_folder_has_no_faults():
    assert not find_faults(TINY, complete())


def test_every_kind_of_fault_is_in_one_error_with_exact_counts(tmp_path):
    entries = complete()
    for expert in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            del entries[f"model.layers.1.mlp.experts.{expert}.{name}.weight"]
    entries["model.extra.weight"] = Entry("model.extra.weight", "BF16", (3,), "f")
    entries["model.norm.weight"] = Entry("model.norm.weight", "BF16", (3,), "f")
    entries["lm_head.weight"] = Entry("lm_head.weight", "I8", (61, 160), "f")
    with pytest.raises(CheckpointError) as caught:
        refuse_faults(find_faults(TINY, entries), TINY, tmp_path)
    text = str(caught.value)
    assert "12 missing: model.layers.1.mlp.experts.0.gate_proj.weight, " in text
    assert "and 4 more" in text
    assert "1 unexpected: model.extra.weight" in text
    assert "1 misshapen: model.norm.weight [3] instead of [160]" in text
    assert "1 mistyped: lm_head.weight I8" in text
    assert f"hint: `benthic inspect {tmp_path}` lists them all" in text


KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_fp8_weights_have_one_scale_a_ragged_block(dtype):
    assert not find_faults(TINY, quantised(KV_A, (2, 2), dtype))


def test_faulty_scales_are_named():
    assert find_faults(TINY, quantised(KV_A, None)).missing == (KV_A + "_scale_inv",)
    assert find_faults(TINY, quantised(KV_A, (1, 1))).misshapen == (KV_A + "_scale_inv [1, 1] instead of [2, 2]",)
    assert find_faults(TINY, quantised(KV_A, (2, 2), "I32")).mistyped == (KV_A + "_scale_inv I32",)
    assert find_faults(TINY, quantised("model.norm.weight", None)).mistyped == ("model.norm.weight F8_E4M3",)


def test_a_scale_without_an_fp8_weight_is_unexpected():
    entries = quantised(KV_A, (2, 2))
    entries[KV_A] = complete()[KV_A]
    assert find_faults(TINY, entries).unexpected == (KV_A + "_scale_inv",)


def test_copies_of_embedding_and_head_and_old_rotary_tables_are_optional():
    entries = complete()
    del entries[PREDICTION + "embed_tokens.weight"], entries[PREDICTION + "shared_head.head.weight"]
    entries["model.layers.0.self_attn.rotary_emb.inv_freq"] = Entry("x", "F32", (4,), "f")
    assert not find_faults(TINY, entries)


def test_a_tied_model_may_store_its_head():
    tied = TINY.replace(tie_word_embeddings=True)
    assert "lm_head.weight" not in complete(tied)
    assert not find_faults(tied, complete(tied))
    assert not find_faults(tied, complete(TINY))


def test_a_folder_without_any_prediction_tensor_is_the_main_model(tmp_path, caplog):
    main = {name: entry for name, entry in complete().items() if not name.startswith(PREDICTION)}
    with caplog.at_level(logging.WARNING, "benthic"):
        config = without_absent_predictions(TINY, main, tmp_path)
    assert config.num_nextn_predict_layers == 0
    assert "num_nextn_predict_layers 1, but the weights hold no prediction layer" in caplog.text
    assert not find_faults(config, main)


def test_a_folder_with_some_prediction_tensors_is_broken(tmp_path):
    entries = complete()
    del entries[PREDICTION + "eh_proj.weight"]
    config = without_absent_predictions(TINY, entries, tmp_path)
    assert config is TINY
    assert find_faults(config, entries).missing == (PREDICTION + "eh_proj.weight",)


def test_prediction_layers_that_config_json_forgets_are_explained(tmp_path):
    forgetful = TINY.replace(num_nextn_predict_layers=0)
    with pytest.raises(
        CheckpointError, match=r"holds prediction layers, but config.json says num_nextn_predict_layers 0"
    ):
        refuse_faults(find_faults(forgetful, complete()), forgetful, tmp_path)

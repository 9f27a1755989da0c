"""Writing: the published layout, its encodings and shards, and that nothing half-written stays."""

import errno
import json
import logging
import os
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benthic.checkpoint import load_into, open_checkpoint, write_checkpoint
from benthic.checkpoint.folder import INDEX, WEIGHTS
from benthic.checkpoint.layout import find_faults
from benthic.checkpoint.shard import ShardWriter
from benthic.checkpoint.writer import Encoding, plan_folder
from benthic.config import ModelConfig
from benthic.config.manifest import stored_tensors
from benthic.errors import CapacityError, CheckpointError, ConfigError, NumericsError
from benthic.numerics.reference.quantisation import dequantise_blocks
from tests.checkpoint.folders import TINY, Bag, random_tensors

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def loaded(folder):
    checkpoint = open_checkpoint(folder)
    bag = Bag(checkpoint.config)
    load_into(bag, checkpoint)
    return bag.state_dict()


def test_names_on_disk_are_the_published_ones(tmp_path):
    tensors = random_tensors(TINY)
    write_checkpoint(tensors, TINY, tmp_path, "fp32")
    stored = load_file(tmp_path / WEIGHTS)
    assert set(stored) == {row.name for row in stored_tensors(TINY)}
    stacked = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(stored["model.layers.1.mlp.experts.3.gate_proj.weight"], stacked[3, :16])
    assert torch.equal(stored["model.layers.1.mlp.experts.3.up_proj.weight"], stacked[3, 16:])
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    assert torch.equal(stored["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_states_dtype_and_token_ids(tmp_path):
    for weights, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp8", "bfloat16")):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path, weights)
        config = ModelConfig.from_pretrained(tmp_path)
        assert config.dtype == dtype
        assert (config.quantization_config is not None) == (weights == "fp8")
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}


def test_generation_settings_of_the_folder_are_kept(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')
    write_checkpoint(random_tensors(TINY), TINY, tmp_path)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"temperature": 0.6, "bos_token_id": 0, "eos_token_id": 1}


def test_fp8_quantises_what_the_published_layout_quantises(tmp_path):
    tensors = random_tensors(TINY)
    write_checkpoint(tensors, TINY, tmp_path, "fp8")
    stored = load_file(tmp_path / WEIGHTS)
    for row in stored_tensors(TINY):
        expected = torch.float8_e4m3fn if row.source.fp8 else torch.bfloat16
        expected = torch.float32 if row.name.endswith("e_score_correction_bias") else expected
        assert stored[row.name].dtype == expected, row.name
        assert (row.name + "_scale_inv" in stored) == row.source.fp8
    assert stored[KV_A].shape == (144, 160)
    assert stored[KV_A + "_scale_inv"].shape == (2, 2)
    restored = dequantise_blocks(stored[KV_A], stored[KV_A + "_scale_inv"])
    assert ((restored - tensors[KV_A]).abs() <= (tensors[KV_A].abs() * 2**-4).clamp(min=1e-4)).all()
    assert "model.layers.2.eh_proj.weight_scale_inv" not in stored


def test_a_stored_fp8_weight_survives_being_saved_again(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "first", "fp8")
    write_checkpoint(loaded(tmp_path / "first"), TINY, tmp_path / "second", "fp8")
    first, second = loaded(tmp_path / "first"), loaded(tmp_path / "second")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-6, atol=0)


def test_power_of_two_scales_are_announced_in_config(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, "fp8", power_of_two_scales=True)
    assert ModelConfig.from_pretrained(tmp_path).quantization_config.scale_fmt == "ue8m0"
    scales = [tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if name.endswith("_scale_inv")]
    assert all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


@pytest.mark.parametrize("weights", ["fp32", "fp8"])
def test_shards_hold_what_one_file_holds(tmp_path, weights):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "one", weights)
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "many", weights, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    one = load_file(tmp_path / "one" / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(files):05d}.safetensors", file) for file in files)
    many = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000 or len(tensors) <= 2
        many |= tensors
    assert set(many) == set(one)
    assert all(torch.equal(many[name].float(), one[name].float()) for name in one)


def test_other_files_stay_and_stale_shards_go(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    for limit in (50_000, 10**9, 90_000):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path, max_shard_bytes=limit)
        loaded(tmp_path)
        shards = {path.name for path in tmp_path.glob("model*.safetensors")}
        assert shards == {entry.file for entry in open_checkpoint(tmp_path).entries.values()}
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_tensors_that_are_not_the_configs_are_named_at_once(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["surprise"] = tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tensors, TINY, tmp_path / "new")
    text = str(caught.value)
    assert "1 missing: lm_head.weight" in text
    assert "1 unknown: surprise" in text
    assert "1 misshapen: model.norm.weight [3] instead of [160]" in text
    assert not (tmp_path / "new").exists()


def test_a_state_dict_with_the_tied_head_is_accepted(tmp_path):
    tied = TINY.replace(tie_word_embeddings=True)
    write_checkpoint(random_tensors(TINY), tied, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)


def test_a_rounded_routing_bias_is_saved_as_float32_with_a_warning(tmp_path, caplog):
    rounded = {name: tensor.bfloat16() for name, tensor in random_tensors(TINY).items()}
    with caplog.at_level(logging.WARNING, "benthic"):
        write_checkpoint(rounded, TINY, tmp_path)
    assert "cast from float32 before saving" in caplog.text
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert load_file(tmp_path / WEIGHTS)[bias].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "int8"}, "weights is 'int8'; allowed: fp32, bf16, fp8"),
        ({"weights": "bf16", "power_of_two_scales": True}, "power-of-two scales belong to fp8"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0; it must be positive"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, text):
    with pytest.raises(CheckpointError, match=text):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def previous(tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(random_tensors(TINY, seed=1), TINY, folder, max_shard_bytes=90_000)
    return folder


def assert_untouched(folder, before):
    assert contents(folder) == before
    assert not [path for path in folder.parent.rglob(".*")]


def test_non_finite_weights_are_not_quantised_and_the_old_checkpoint_stays(previous):
    before, tensors = contents(previous), random_tensors(TINY)
    tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 7] = torch.nan
    with pytest.raises(NumericsError, match=r"experts.2.down_proj.weight: 1 of 2560 .* at \[5, 7\]"):
        write_checkpoint(tensors, TINY, previous, "fp8")
    assert_untouched(previous, before)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_leaves_the_old_checkpoint(previous, monkeypatch, code):
    before, written = contents(previous), []

    def write(self, name, tensor):
        written.append(name)
        if len(written) > 30:
            raise OSError(code, os.strerror(code))
        original(self, name, tensor)

    original = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(CapacityError, match=r"cannot write .*model: .*(.|\n)*free some space"):
        write_checkpoint(random_tensors(TINY), TINY, previous, max_shard_bytes=60_000)
    assert_untouched(previous, before)


def test_too_small_a_disk_is_refused_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(CapacityError, match=r"0.00 GiB free; the checkpoint needs"):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "file" / "model")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_no_permission_is_a_clear_error(tmp_path, monkeypatch):
    def mkdir(self, *arguments, **options):
        if not self.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    with pytest.raises(CheckpointError, match=r"Permission denied(.|\n)*choose a folder that you may write to"):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "new")


def test_a_broken_generation_config_is_told_before_anything_is_written(previous):
    (previous / "generation_config.json").write_text("{")
    before = contents(previous)
    with pytest.raises(ConfigError, match=r"generation_config.json is not valid JSON"):
        write_checkpoint(random_tensors(TINY), TINY, previous)
    assert_untouched(previous, before)


def test_the_plan_of_deepseek_v3_has_the_released_tensors():
    """Counts of the released index: 46,183 weights and 45,808 scales; 684,489,845,504 weights with second copies."""
    config = ModelConfig.from_pretrained("deepseek-v3")
    encoding = Encoding("fp8")
    rows = [(row, encoding.entries(row)) for row in stored_tensors(config)]
    shards = plan_folder(rows, 5 * 10**9)
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    scales = {name: entry for name, entry in entries.items() if name.endswith("_scale_inv")}
    assert (len(entries) - len(scales), len(scales)) == (46_183, 45_808)
    assert sum(entry.size for entry in entries.values()) - sum(one.size for one in scales.values()) == 684_489_845_504
    assert scales["model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert scales["model.layers.61.mlp.experts.255.down_proj.weight_scale_inv"].shape == (56, 16)
    assert entries["model.layers.61.eh_proj.weight"].dtype == "BF16"
    assert all(sum(entry.num_bytes for entry in shard.entries) <= 5 * 10**9 for shard in shards)
    for name in scales:
        assert entries[name].file == entries[name.removesuffix("_scale_inv")].file
    assert not find_faults(encoding.configured(config), entries)

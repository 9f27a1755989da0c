"""Conversion equals loading and saving again, keeps what it need not touch, and never harms a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benthic.checkpoint import convert, load_into, open_checkpoint, write_checkpoint
from benthic.checkpoint.folder import WEIGHTS
from benthic.config import ModelConfig
from benthic.errors import CheckpointError
from tests.checkpoint.folders import TINY, Bag, random_tensors


def loaded(folder):
    checkpoint = open_checkpoint(folder)
    bag = Bag(checkpoint.config)
    load_into(bag, checkpoint)
    return bag.state_dict()


def assert_same_files(left, right):
    left, right = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].float(), right[name].float()), name


@pytest.mark.parametrize("start", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("end", ["fp32", "bf16", "fp8"])
def test_converting_equals_loading_and_saving(tmp_path, start, end):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source", start, max_shard_bytes=200_000)
    convert(tmp_path / "source", tmp_path / "target", end)
    if (start, end) == ("fp8", "fp8"):
        write_checkpoint(random_tensors(TINY), TINY, tmp_path / "expected", "fp8")
    else:
        write_checkpoint(loaded(tmp_path / "source"), TINY, tmp_path / "expected", end)
    assert_same_files(tmp_path / "target", tmp_path / "expected")
    target = json.loads((tmp_path / "target" / "config.json").read_text())
    assert target == json.loads((tmp_path / "expected" / "config.json").read_text())


def test_shards_and_back(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "one", "fp8")
    convert(tmp_path / "one", tmp_path / "many", "fp8", max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert(tmp_path / "many", tmp_path / "again", "fp8")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()


def test_power_of_two_scales_are_made_and_kept(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source", "bf16")
    write_checkpoint(loaded(tmp_path / "source"), TINY, tmp_path / "expected", "fp8", power_of_two_scales=True)
    convert(tmp_path / "source", tmp_path / "made", "fp8", power_of_two_scales=True)
    convert(tmp_path / "made", tmp_path / "kept", "fp8")
    for name in ("made", "kept"):
        assert_same_files(tmp_path / name, tmp_path / "expected")
        assert ModelConfig.from_pretrained(tmp_path / name).quantization_config.scale_fmt == "ue8m0"


def test_plain_scales_become_powers_of_two_when_asked(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source", "fp8")
    convert(tmp_path / "source", tmp_path / "target", "fp8", power_of_two_scales=True)
    before, after = loaded(tmp_path / "source"), loaded(tmp_path / "target")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert ((after[name] - before[name]).abs() <= before[name].abs() * 2**-4 + 2**-15).all()


def test_config_json_keeps_its_spelling_and_small_files_are_copied(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(random_tensors(TINY), TINY, source, "fp8")
    data = json.loads((source / "config.json").read_text())
    data["torch_dtype"] = data.pop("dtype")
    data |= {"ep_size": 1, "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    (source / "config.json").write_text(json.dumps(data))
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / ".cache").mkdir()
    convert(source, tmp_path / "target", "bf16")
    converted = json.loads((tmp_path / "target" / "config.json").read_text())
    assert converted == {key: value for key, value in data.items() if key != "quantization_config"}
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "target" / "tokenizer.json").read_text() == '{"a": 1}'


def test_progress_ends_at_the_total(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source")
    seen = []
    convert(tmp_path / "source", tmp_path / "target", "fp8", progress=lambda *pair: seen.append(pair))
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)
    assert len(seen) == len(load_file(tmp_path / "target" / WEIGHTS))


def test_no_folder_is_overwritten(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"source and target are both"):
        convert(tmp_path / "source", tmp_path / "x" / ".." / "source", "fp8")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match=r"used exists and is not an empty folder(.|\n)*name a new folder"):
        convert(tmp_path / "source", tmp_path / "used", "fp8")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "source", tmp_path / "empty", "fp8")
    assert loaded(tmp_path / "empty")


def test_a_source_that_breaks_half_way_leaves_no_target(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.experts.down_proj"][3] = torch.inf
    write_checkpoint(tensors, TINY, tmp_path / "source", "fp32")
    with pytest.raises(ArithmeticError, match=r"experts.3.down_proj.weight: 2560 of 2560 elements are not finite"):
        convert(tmp_path / "source", tmp_path / "target", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

"""Broken folders are told apart, each with a message that names file and fault."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benthic.checkpoint import load_into, open_checkpoint, write_checkpoint
from benthic.checkpoint.folder import INDEX, WEIGHTS, read_entries
from benthic.errors import BenthicError, CheckpointError
from tests.checkpoint.folders import TINY, Bag, random_tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_checkpoint(random_tensors(TINY), TINY, folder / "one")
    write_checkpoint(random_tensors(TINY), TINY, folder / "shards", max_shard_bytes=60_000)
    return folder


@pytest.fixture
def one(written, tmp_path):
    return shutil.copytree(written / "one", tmp_path / "one")


@pytest.fixture
def shards(written, tmp_path):
    return shutil.copytree(written / "shards", tmp_path / "shards")


def change_index(folder, change):
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def test_entries_come_in_the_order_of_their_bytes(one, shards):
    assert set(read_entries(one)) == set(read_entries(shards))
    files = [entry.file for entry in read_entries(shards).values()]
    assert files == sorted(files)
    assert len(set(files)) > 2


def test_a_truncated_file_is_named_with_its_size(one):
    path = one / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} \([\d,]+ bytes\) is truncated or not a safetensors file"):
        read_entries(one)


def test_all_broken_shards_are_named_at_once(shards):
    (shards / "model-00001-of-00004.safetensors").unlink(missing_ok=True)
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    (shards / files[0]).unlink()
    (shards / files[-1]).write_bytes(b"garbage")
    with pytest.raises(CheckpointError) as caught:
        read_entries(shards)
    assert f"{files[0]} does not exist" in str(caught.value)
    assert f"{files[-1]} (7 bytes) is truncated" in str(caught.value)
    assert "copy or download these files again" in str(caught.value)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..", 3, None])
def test_an_index_cannot_point_outside_its_folder(shards, file):
    change_index(shards, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    with pytest.raises(CheckpointError, match=r"places lm_head.weight in .*must be the name of a .safetensors file"):
        read_entries(shards)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "\x00", "[" * 10**5])
def test_an_index_that_is_no_index_is_refused(shards, text):
    (shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        read_entries(shards)


def test_an_index_of_another_checkpoint_is_refused(shards):
    def move(weight_map):
        weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]

    change_index(shards, move)
    with pytest.raises(CheckpointError, match=r"places 1 tensors in shards that do not hold them: model.norm.weight"):
        read_entries(shards)


def test_a_tensor_in_two_shards_is_refused(shards):
    save_file({"model.norm.weight": torch.ones(160)}, shards / "more.safetensors")
    change_index(shards, lambda weight_map: weight_map.update({"other": "more.safetensors"}))
    with pytest.raises(CheckpointError, match=r"1 tensors lie in two shards: model.norm.weight \(m"):
        read_entries(shards)


def test_one_file_beside_an_index_of_shards_is_ambiguous(shards):
    save_file({"a": torch.ones(1)}, shards / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"unclear which is the model(.|\n)*remove the one that is stale"):
        read_entries(shards)


def test_pickled_weights_are_not_read(one):
    (one / WEIGHTS).rename(one / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"it holds pytorch_model.bin(.|\n)*never pickled files"):
        read_entries(one)


def test_a_folder_that_does_not_exist_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder(.|\n)*`benthic demo` makes one"):
        open_checkpoint(tmp_path / "nothing")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_but_our_errors(written, tmp_path, data):
    """Cut the file or flip bits, mostly in the header; what still parses must load or be refused by the manifest."""
    content = bytearray((written / "one" / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            place = data.draw(st.integers(0, min(header, len(content)) - 1))
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    shutil.copy(written / "one" / "config.json", folder)
    (folder / WEIGHTS).write_bytes(content)
    try:
        load_into(Bag(TINY), open_checkpoint(folder))
    except BenthicError as error:
        assert isinstance(error, CheckpointError)  # noqa: PT017


def test_a_shard_whose_name_no_file_can_have_is_missing(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}))
    with pytest.raises(CheckpointError, match=r"xxx\.safetensors does not exist"):
        read_entries(tmp_path)

"""`benthic inspect` from the outside."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.checkpoint import write_checkpoint
from benthic.cli import inspect
from benthic.cli.main import main
from benthic.config.manifest import stored_tensors
from tests.checkpoint.folders import TINY, random_tensors


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path)
    return tmp_path


def test_a_good_folder_is_summarised(folder, capsys):
    assert inspect.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "deepseek_v3, " in out
    assert "1 shared + 4 routed experts, 2 chosen; 1 prediction layer(s)" in out
    assert "      8  BF16     [16, 160]          model.layers.*.mlp.experts.*.gate_proj.weight" in out
    assert out.endswith("no faults\n")


def test_json_lists_every_tensor_and_hash(folder, capsys):
    assert inspect.main([str(folder), "--json", "--hashes"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in data["tensors"]} == {row.name for row in stored_tensors(TINY)}
    assert data["faults"] == []
    assert data["config"]["model_type"] == "deepseek_v3"
    assert data["bytes"] == sum(one["bytes"] for one in data["tensors"])
    assert len(data["files"]["model.safetensors"]["sha256"]) == 64
    assert data["by_dtype"]["F32"]["tensors"] == 2


def test_one_tensor_can_be_looked_up(folder, capsys):
    assert inspect.main([str(folder), "--tensor", "*.1.mlp.gate.*"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "mlp" in line]
    assert len(lines) == 2
    assert "BF16     [4, 160]           model.layers.1.mlp.gate.weight  (model.safetensors)" in lines[1]


def test_faults_end_with_exit_code_1(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    assert inspect.main([str(folder)]) == 1
    assert capsys.readouterr().out.endswith("fault: missing: lm_head.weight\n1 fault(s)\n")
    assert inspect.main([str(folder), "--check", "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults == ["missing: lm_head.weight", "not finite: model.norm.weight, 1 of 160 elements"]


def test_a_truncated_file_is_a_fault_and_no_traceback(folder, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["inspect", str(folder), "--check"]) == 1
    assert "fault: " in capsys.readouterr().out


def test_no_folder_ends_with_exit_code_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "error: there is no folder" in capsys.readouterr().err

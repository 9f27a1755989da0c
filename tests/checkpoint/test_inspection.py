"""Inspection counts what is there and collects faults without raising."""

import hashlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.checkpoint import inspect_folder, write_checkpoint
from benthic.checkpoint.folder import WEIGHTS, total_bytes
from benthic.checkpoint.inspection import file_hash, non_finite_tensors, totals_by_dtype, totals_by_part
from benthic.config.manifest import parameters, stored_tensors
from benthic.errors import CheckpointError
from tests.checkpoint.folders import TINY, random_tensors


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_totals_agree_with_the_manifest_and_with_each_other(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, "fp8")
    inspection = inspect_folder(tmp_path)
    assert not inspection.faults
    assert inspection.num_parameters == sum(row.size for row in parameters(TINY))
    by_part, by_dtype = totals_by_part(inspection), totals_by_dtype(inspection.entries.values())
    num_bytes = total_bytes(inspection.entries.values())
    assert (
        sum(total.bytes for total in by_part.values()) == sum(total.bytes for total in by_dtype.values()) == num_bytes
    )
    weights = by_dtype["F8_E4M3"].elements + by_dtype["BF16"].elements + 2 * 4
    assert weights == sum(row.size for row in stored_tensors(TINY))
    assert by_part["embedding"].tensors == by_part["head"].tensors == 1
    assert by_part["routed"].tensors == 4 * 3 * 2
    assert by_part["routed"].elements > 4 * 3 * 16 * 160  # scales lie with their weights
    assert "unexpected" not in by_part


def test_faults_are_collected(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path)

    def change(tensors):
        tensors["surprise"] = tensors.pop("lm_head.weight")
        tensors["model.norm.weight"] = torch.ones(2)

    edit(tmp_path, change)
    inspection = inspect_folder(tmp_path)
    assert inspection.faults == (
        "missing: lm_head.weight",
        "unexpected: surprise",
        "misshapen: model.norm.weight [2] instead of [160]",
    )
    assert totals_by_part(inspection)["unexpected"].tensors == 1


def test_a_broken_file_and_a_broken_config_are_both_told(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    inspection = inspect_folder(tmp_path)
    assert "model.safetensors (1 bytes) is truncated" in inspection.faults[0]
    assert "model_type is None" in inspection.faults[1]
    assert inspection.num_parameters == 0
    assert not totals_by_part(inspection)
    assert not list(non_finite_tensors(inspection))


@pytest.mark.parametrize("weights", ["fp32", "fp8"])
def test_values_that_are_not_finite_are_found(tmp_path, weights):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, weights)
    assert not list(non_finite_tensors(inspect_folder(tmp_path)))

    name = "model.layers.0.mlp.up_proj.weight" + ("_scale_inv" if weights == "fp8" else "")

    def change(tensors):
        tensors["model.norm.weight"][3] = torch.nan
        tensors[name][0, :2] = torch.inf

    expected = ["not finite: model.norm.weight, 1 of 160 elements"]
    expected += [f"not finite: {name}, 2 of {2 if weights == 'fp8' else 48 * 160} elements"]
    edit(tmp_path, change)
    assert sorted(non_finite_tensors(inspect_folder(tmp_path))) == sorted(expected)


def test_hashes_are_those_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        inspect_folder(tmp_path / "nothing")


def test_inspection_needs_no_torch():
    code = "import benthic.checkpoint.inspection, benthic.cli.inspect, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

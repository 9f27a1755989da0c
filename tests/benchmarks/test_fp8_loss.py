"""The comparison of losses: arms kept and resumed, the paper's smoothing, and 128 x 128 gradients that differ."""

import json
import sys

import pytest
import torch

from benchmarks import fp8_loss
from benthic.config.manifest import parameters
from benthic.ops import float8


def run(folder, monkeypatch, *arguments: str) -> dict:
    small = ["--size", "tiny", "--text", "procedural", "--steps", "4", "--block-steps", "2", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["fp8_loss", "--out", str(folder), "--length", "32", *small, *arguments])
    assert fp8_loss.main() == 0
    return json.loads((folder / "fp8_loss.json").read_text())


def test_arms_train_and_a_second_run_keeps_those_that_finished(tmp_path, monkeypatch):
    first = run(tmp_path, monkeypatch, "--arms", "bfloat16", "float8")
    assert list(first["arms"]) == ["bfloat16", "float8"]
    both = [first["arms"][arm]["losses"] for arm in first["arms"]]
    assert [len(losses) for losses in both] == [4, 4]
    assert both[0] != both[1]
    assert abs(first["summary"]["float8"]["mean_difference_of_last_tenth_percent"]) < 1
    second = run(tmp_path, monkeypatch)
    assert second["arms"]["bfloat16"] == first["arms"]["bfloat16"]
    assert len(second["arms"]["blocks"]["losses"]) == 2
    assert second["arms"]["again"]["losses"] != first["arms"]["bfloat16"]["losses"]


def test_no_arm_prepares_the_text_and_an_unknown_one_is_named(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--arms")["arms"] == {}
    assert (tmp_path / "data" / "train.bin").exists()
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--arms", "float9")
    assert "--arms knows bfloat16, again, float8, blocks, not float9" in capsys.readouterr().err


def test_out_of_time_keeps_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_loss, "EVERY", 2)
    kept = run(tmp_path, monkeypatch, "--seconds", "0", "--arms", "bfloat16")["arms"]["bfloat16"]
    assert (len(kept["losses"]), kept["finished"]) == (2, False)


def test_smoothing_is_the_papers():
    assert fp8_loss.smoothed([1.0, 2.0, 3.0]) == pytest.approx([1.0, 1.1, 1.29])


def test_gradients_by_blocks_lose_a_small_token_and_leave_no_trace():
    grad = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad[0] *= 2.0**-24
    usual = float8.arithmetic("cpu")
    with fp8_loss.gradients_by_blocks("cpu"):
        values, scales = float8.arithmetic("cpu").gradient_rows(grad)
    assert not values[0].float().any()
    assert usual.gradient_rows(grad)[0][0].float().any()
    assert torch.equal(scales[:, 0], scales[:, 127])
    assert float8.arithmetic("cpu") is usual


def test_the_model_has_at_least_half_a_billion_parameters():
    assert sum(row.size for row in parameters(fp8_loss.model_config("half-billion"))) > 5e8

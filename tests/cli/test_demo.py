"""benthic demo, shortened: the whole story ends with a model that transformers loads and agrees with."""

import json

import pytest
import torch

import benthic
from benthic.cli import demo
from benthic.errors import ConfigError, RunError


@pytest.mark.slow
def test_the_demo_ends_with_a_model_that_transformers_agrees_with(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "demo"
    assert demo.main(["--steps", "12", "--source", "procedural", "--run-folder", str(folder)]) == 0
    shown = capsys.readouterr().out
    for part in ("The plan", "What came of it", "bits a byte", "zlib", "xz", "MaxVio", "MTP", "A completion"):
        assert part in shown
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1

    ours = benthic.load_model(folder / "model", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder / "model")("sort 3 1 2", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max()
    assert difference < 1e-4

    # A second run sets the first aside and prepares no text again.
    assert demo.main(["--steps", "1", "--source", "procedural", "--run-folder", str(folder)]) == 0
    assert (tmp_path / "demo-1" / "model" / "config.json").exists()
    assert (folder / "model" / "config.json").exists()


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="--steps is 0; at least 1"):
        demo.main(["--steps", "0"])


def test_a_folder_that_is_no_run_is_never_moved(tmp_path):
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        demo.main(["--steps", "1", "--source", "procedural", "--run-folder", str(folder)])
    assert (folder / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [folder]

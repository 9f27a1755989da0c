"""`benthic bench train` compares equal work, refuses to time what disagrees, and says what it lacks."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benthic.cli import bench
from benthic.cli.main import main
from benthic.config.published import config_to_published
from benthic.errors import NumericsError
from tests.model.configs import CONFIGS, tiny


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "config.json"
    # grouped_mm, which transformers runs, asks for rows of whole 16 bytes.
    path.write_text(json.dumps(config_to_published(tiny(**(CONFIGS["v3"] | {"moe_intermediate_size": 12})))))
    return str(path)


SMALL = "--batch 2 --sequence-length 8 --prompt-tokens 4 --new-tokens 3 --repetitions 2 --threads 1".split()


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_a_result_is_printed_and_kept(preset, tmp_path, capsys):
    output = tmp_path / "kept" / "train.json"
    assert main(["bench", "train", "--preset", preset, *SMALL, "--output", str(output)]) == 0
    assert "times transformers" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert set(result["training"]["speed"]) == {"benthic", "transformers", "benthic with prediction"}
    assert result["workload"]["batch"] == 2
    assert {"commit", "processor", "versions", "command"} <= set(result["machine"])
    ratio = result["decoding"]["times_transformers"]
    assert 0 < ratio["first_quartile"] <= ratio["median"] <= ratio["third_quartile"] <= ratio["best"]


@pytest.mark.usefixtures("_threads")
def test_nothing_is_timed_while_the_models_disagree(preset, monkeypatch):
    train = bench._benchmark("train")
    models = train._models

    def wrong(*arguments):
        ours, theirs = models(*arguments)
        with torch.no_grad():
            ours.model.norm.weight[0] += 1
        return ours, theirs

    monkeypatch.setattr(train, "_models", wrong)
    monkeypatch.setattr(train, "seconds_in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(NumericsError, match="logits"):
        train.measure(train.Workload(preset=preset, batch=1, sequence_length=8, prompt_tokens=2, threads=1))


def test_without_transformers_it_says_what_to_install(preset, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "train", "--preset", preset, *SMALL]) == 2
    assert "pip install transformers" in capsys.readouterr().err


def test_a_model_that_transformers_lacks_is_refused(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_published(tiny(**CONFIGS["multi-query with predictions"]))))
    assert main(["bench", "train", "--preset", str(path), *SMALL]) == 2
    assert "transformers has no model for preset" in capsys.readouterr().err


def test_without_the_source_it_says_where_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", "train"]) == 2
    assert "benchmarks come with the source" in capsys.readouterr().err

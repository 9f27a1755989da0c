"""`benthic train` as a user meets it: overrides, refusals with a way out, what it prints."""

import json
import subprocess
import sys

import pytest
import yaml

from benthic.cli.main import main
from benthic.cli.train import over_all_processes, split_settings, with_states_alone_split
from benthic.config.override import override
from benthic.config.parallel import ParallelConfig
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError
from benthic.train.run import run
from tests.train.small import small_run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(small_run(steps=4).to_yaml())
    return path


def refused(capsys, *arguments):
    assert main(["train", *arguments]) == 2
    return capsys.readouterr().err


def test_a_recipe_from_a_file_is_trained_and_its_model_named_on_stdout(config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", str(config), "--run-folder", str(folder), "--steps=3", "--logging.every", "1"]) == 0
    assert capsys.readouterr().out == f"{folder / 'model'}\n"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert main(["train", "--resume", "--run-folder", str(folder), "--steps", "4"]) == 0
    assert TrainConfig.from_yaml(folder / "config.yaml").steps == 4


def test_shown_config_is_yaml_that_reads_back(config, capsys):
    assert main(["train", str(config), "--show-config", "--optimizer.learning_rate", "1e-3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optimizer"]["learning_rate"] == {"peak": 1e-3, "start": 1.0, "phases": []}
    assert TrainConfig(**shown).steps == 4


def test_plan_only_states_size_and_cost_and_needs_no_torch():
    code = (
        "import sys; from benthic.cli.main import main; code = main(['train', 'demo', '--plan-only']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "FLOPs", "memory", "activations", "time", "tokens/s", "assumed"):
        assert part in done.stdout


def test_plan_only_says_when_a_device_is_too_small(capsys):
    big = ["train", "tiny", "--model", "deepseek-v2-lite", "--data.sequence_length", "4096", "--plan-only"]
    assert main([*big, "--plan-device", "h200"]) == 0
    assert "of 139 GiB: DOES NOT FIT" in capsys.readouterr().out
    assert main([*big, "--plan-device", "h2000"]) == 2
    assert "unknown device 'h2000'" in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "tiny", "--model", "deepseek-v2-lite", "--run-folder", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert "training needs" in shown
    assert "hint: what fits" in shown
    assert "--batch.micro_sequences" in shown
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["dmeo"], "'dmeo' is neither a recipe nor a config file", "did you mean 'demo'?"),
        ([], "which recipe? none was named", "benthic train demo"),
        (["demo", "--optimiser.weight_decay", "0"], "unknown option --optimiser.weight_decay", "'optimizer'"),
        (["demo", "--optimizer.weight_decy", "0"], "unknown key 'weight_decy' in optimizer", "'weight_decay'"),
        (["demo", "--resum"], "unknown option --resum", "'resume'"),
        (["demo", "--steps"], "option --steps needs a value", ""),
        (["demo", "--steps", "0"], "steps: Input should be greater than 0 (given 0)", ""),
        (["demo", "--steps.more", "1"], "steps is a single value", ""),
        (["demo", "--optimizer.learning_rate.phases.9.factor", "1"], "has 3 entries", ""),
        (["demo", "--optimizer.weight_decay", "[1"], "cannot read the value of --optimizer.weight_decay", ""),
        (["demo", "--batch.sequences", "7", "--batch.micro_sequences", "2"], "must be a multiple", ""),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_thing(capsys, arguments, message, hint):
    said = refused(capsys, *arguments)
    assert message in said
    assert hint in said
    assert "Traceback" not in said


def test_a_run_folder_in_use_is_refused(config, tmp_path, capsys):
    run(small_run(steps=1), tmp_path / "run")
    said = refused(capsys, str(config), "--run-folder", str(tmp_path / "run"))
    assert "is not empty" in said
    assert "--resume" in said


def test_a_yaml_that_is_no_config_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [")
    assert "is not valid YAML" in refused(capsys, str(path))
    path.write_text("- 1")
    assert "holds a list, not a mapping" in refused(capsys, str(path))
    path.write_text("name: x\nstepz: 3")
    said = refused(capsys, str(path))
    assert "unknown key 'stepz'" in said
    assert "did you mean 'steps'?" in said


def test_help_is_short_and_shows_dotted_names(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--optimizer.learning_rate 3e-3" in shown
    assert len(shown.splitlines()) < 30


def test_settings_take_any_value_and_leave_the_rest():
    own, settings = split_settings(["demo", "--steps=2"])
    assert (own, settings) == (["demo"], {"steps": "2"})
    own, settings = split_settings(["--run-folder", "x", "--data.path", "-1", "--resume", "demo"])
    assert (own, settings) == (["--run-folder", "x", "--resume", "demo"], {"data.path": "-1"})


def test_overrides_reach_into_lists_and_give_frozen_configs():
    changed = override(small_run(), {"optimizer.learning_rate.phases.0.until": "9", "sampling.prompts": "[a, b]"})
    assert changed.optimizer.learning_rate.phases[0].until == 9
    assert changed.sampling.prompts == ("a", "b")
    with pytest.raises(ConfigError, match="there is no 'x'"):
        override(small_run(), {"optimizer.learning_rate.phases.x.until": "9"})


def test_a_run_folder_in_the_wrong_place_is_told_its_place(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert main(["train", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "is the folder of a run" in shown
    assert f"--resume --run-folder {tmp_path}" in shown
    assert main(["train", "--resume", "--run-folder", str(tmp_path / "none")]) == 2
    assert "nothing to resume in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "settings", "processes", "shard"),
    [
        ("", {}, 1, None),  # nothing changes without torchrun
        ("", {}, 4, "4"),
        ("", {"parallel.expert": "2"}, 4, "4"),
        ("", {"parallel.replicate": "2", "parallel.expert": "4"}, 8, "4"),
        ("", {"parallel.shard": "3"}, 4, None),  # what was said stands, and is refused later
        ("fsdp=4,ep=2", {}, 4, None),
        ("fsdp=4,ep=2", {}, 2, "2"),  # a run goes on with fewer ranks
        ("dp=2,fsdp=2", {}, 8, "4"),
    ],
)
def test_weights_are_split_over_the_processes_that_no_other_axis_takes(layout, settings, processes, shard):
    found = over_all_processes(ParallelConfig.parse(layout), settings, processes)
    assert found.get("parallel.shard") == (shard or settings.get("parallel.shard"))


@pytest.mark.parametrize(
    ("layout", "settings", "zero"),
    [
        ("fsdp=4", {}, None),
        ("fsdp=4", {"parallel.pipeline": "2"}, "1"),
        ("fsdp=4,zero=0", {"parallel.pipeline": "2"}, None),
        ("fsdp=2,pp=2", {}, "1"),
        ("fsdp=2,pp=2", {"parallel.pipeline": "1"}, None),
        ("fsdp=2,pp=2", {"parallel.zero": "3"}, "3"),  # what was said stands, and is refused later
    ],
)
def test_a_pipeline_splits_optimiser_states_where_nothing_is_said(layout, settings, zero):
    assert with_states_alone_split(ParallelConfig.parse(layout), settings).get("parallel.zero") == zero


def test_a_layout_for_many_processes_says_how_to_start_them(config, tmp_path, capsys):
    told = refused(capsys, str(config), "--run-folder", str(tmp_path / "run"), "--parallel.shard", "2")
    assert "the layout (fsdp=2,zero=3) is for 2 processes, but 1 were started" in told
    assert "torchrun --nproc-per-node 2" in told
    assert not (tmp_path / "run").exists()


def test_a_run_over_ranks_is_planned_with_its_layout(capsys):
    assert main(["train", "deepseek-v3", "--plan-only", "--plan-device", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "2,048 x" in shown
    assert "fsdp=128,zero=1,ep=64,pp=16,schedule=dualpipev" in shown
    assert "DOES NOT FIT" not in shown


def test_a_rank_that_does_not_speak_leaves_with_the_same_code(config, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(config), "--parallel.expert", "3"]) == 2
    assert capsys.readouterr().err == ""

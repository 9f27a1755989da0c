"""The arms of the training benchmark: each alone, failures kept as rows, results merged; and one small arm for real."""

from __future__ import annotations

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import torchtitan_peer, train_arm, train_gpu
from benchmarks.train_arms import ARMS, DEFAULT_ARMS, Arm, model_config, planned, train_config
from benthic.cli.main import main
from benthic.config.manifest import parameters
from benthic.plan.flops import training_flops_per_token
from benthic.plan.memory import training_memory

SMALL = Arm(model="tiny", compute="float32", batch=2, sequence_length=16, warm_up=1, steps=3)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(train_gpu, "require_gpu", lambda what: None)


@pytest.fixture
def processes(monkeypatch):
    """Arms that end at once, with a result that tells the command."""

    def run(command, **options):
        arm = json.loads(command[3])
        if arm["compute"] == "float8":
            return SimpleNamespace(returncode=1, stderr="no kernel image")
        result = {"arm": arm, "tokens_per_second": 1e4, "tflops": 57.4, "step_seconds": SECONDS}
        with open(command[4], "w") as file:
            file.write(json.dumps(result))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)


SECONDS = {"median": 0.2, "first_quartile": 0.19, "third_quartile": 0.21}


def test_the_bench_model_is_the_one_that_is_told():
    config = model_config("lite")
    assert train_arm.parameter_count(config) == 4_594_374_656
    assert training_flops_per_token(config, 4096) == pytest.approx(5.738e9, rel=1e-3)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)


@pytest.mark.parametrize("name", [name for name in ARMS if ARMS[name].trainer == "benthic"])
def test_every_arm_is_a_run_that_fits_the_gpu(name):
    arm = ARMS[name]
    config = train_config(arm)
    assert config.batch.micro_sequences == arm.batch == (8 if arm.model == "v3" else 4)
    assert config.data.sequence_length == 4096
    assert not config.data.mask_documents
    assert training_memory(model_config(arm.model), planned(arm)).total < 139 * 2**30


def test_a_small_arm_makes_real_updates():
    result = train_arm.measure(SMALL, "cpu")
    assert math.isfinite(result["loss"])
    assert result["loss"] < 1.1 * math.log(model_config("tiny").vocab_size)
    assert len(result["max_violation"]) == len(
        [row for row in parameters(model_config("tiny")) if row.group == "routing_bias"]
    )
    seconds = result["step_seconds"]
    assert len(seconds["all"]) == 3
    assert seconds["first_quartile"] <= seconds["median"] <= seconds["third_quartile"]
    assert result["tokens_per_second"] == pytest.approx(32 / seconds["median"])
    assert result["tflops"] == pytest.approx(result["tokens_per_second"] * result["flops_per_token"] / 1e12)


def test_a_profile_is_kept_beside_the_result(tmp_path):
    path = train_gpu.profile_path(tmp_path / "train_gpu.json", "bf16")
    train_arm.measure(SMALL, "cpu", path)
    assert path.name == "train_gpu_profile_bf16.json"
    found = json.loads(path.read_text())
    assert found["arm"]["model"] == "tiny"
    assert {"span_seconds", "idle_seconds", "launches", "operations", "limits", "step_seconds"} <= set(found)
    if not torch.cuda.is_available():
        assert found["operations"] == []  # a processor has no kernels


def test_every_batch_is_new_and_spread_over_the_vocabulary():
    config = train_config(SMALL)
    batches = train_arm.random_batches(config)
    first, second = next(batches), next(batches)
    assert first.tokens.shape == (2, 17)
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(next(train_arm.random_batches(config)).tokens, first.tokens)
    assert first.tokens.unique().numel() > 30


def test_arms_are_merged_and_failures_kept(gpu, processes, tmp_path):
    output = tmp_path / "train_gpu.json"
    document = train_gpu.measure(train_gpu.Options(arms=("bf16", "float8")), output, add=False)
    assert document["arms"]["bf16"]["tokens_per_second"] == 1e4
    assert document["arms"]["float8"]["error"] == "ended with code 1: no kernel image"
    assert json.loads(output.read_text()) == document
    assert train_gpu.failures(document) == ["float8: ended with code 1: no kernel image"]
    added = train_gpu.measure(train_gpu.Options(arms=("v3-bf16",)), output, add=True)
    assert list(added["arms"]) == ["bf16", "float8", "v3-bf16"]
    alone = train_gpu.measure(train_gpu.Options(arms=("v3-bf16",)), output, add=False)
    assert list(alone["arms"]) == ["v3-bf16"]


def test_an_arm_that_never_ends_is_stopped_and_recorded(gpu, monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"compiling ...\n")

    monkeypatch.setattr(subprocess, "run", run)
    document = train_gpu.measure(train_gpu.Options(arms=("bf16",), arm_seconds=7), None, add=False)
    assert document["arms"]["bf16"]["error"] == "stopped after 7 s: compiling ..."


def test_peers_that_are_not_installed_are_left_out_unless_named(monkeypatch, capsys):
    monkeypatch.setattr(torchtitan_peer, "missing", lambda: ["torchtitan", "tyro"])
    chosen = train_gpu.chosen_arms(train_gpu.Options())
    assert set(DEFAULT_ARMS) - set(chosen) >= {"torchtitan", "torchtitan-bf16"}
    assert main(["bench", "train", "--arms", "torchtitan"]) == 2
    told = capsys.readouterr().err
    assert "the arm torchtitan needs torchtitan, tyro" in told
    assert "pip install torchtitan tyro" in told


def test_steps_reach_the_arms():
    assert train_gpu.chosen_arms(train_gpu.Options(arms=("bf16",), steps=30))["bf16"].steps == 30


def test_the_table_tells_speed_spread_memory_and_errors(gpu, processes):
    document = train_gpu.measure(train_gpu.Options(arms=("bf16", "float8")), None, add=False)
    document["arms"]["bf16"] |= {
        "memory": {"planned_gib": 87.4, "allocated_gib": 87.5, "reserved_gib": 90.0},
        "max_violation": [0.1, 0.25], "matmul_share": 0.5,
    }  # fmt: skip
    head, ours, broken = train_gpu.table(document).splitlines()
    assert "10,000" in ours
    assert "200.0 (190.0 to 210.0)" in ours
    assert "50.0%" in ours
    assert ours.split()[-4:] == ["87.4", "87.5", "90.0", "0.25"]
    assert "no kernel image" in broken
    assert "MaxVio" in head


def test_the_table_tells_how_many_times_as_fast_a_pair_is(gpu, processes):
    document = train_gpu.measure(train_gpu.Options(arms=("bf16",)), None, add=False)
    document["arms"]["torchtitan-bf16"] = document["arms"]["bf16"] | {"tokens_per_second": 8e3}
    assert train_gpu.table(document).endswith("bf16 is 1.25 times as fast as torchtitan-bf16\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_arms_are_refused(capsys):
    assert main(["bench", "train", "--arms", "bf16"]) == 2
    assert "training is timed on a GPU, and torch" in capsys.readouterr().err


def test_an_unknown_arm_is_refused_with_the_nearest(capsys):
    assert main(["bench", "train", "--arms", "bf61"]) == 2
    told = capsys.readouterr().err
    assert "there is no arm 'bf61'; there are bf16, bf16-moments" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--arms bf16 --preset tiny", "--arms and --preset belong to different measurements"),
        ("--profile --device cpu", "--profile and --device belong to different measurements"),
        ("--arms bf16 --add", "--add keeps what --output holds, and there is no --output"),
        ("--arms bf16 --steps 3", "steps: Input should be greater than or equal to 15"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, told, capsys):
    assert main(["bench", "train", *arguments.split()]) == 2
    assert told in capsys.readouterr().err

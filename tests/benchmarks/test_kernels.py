"""The runner of kernel cases: nothing wrong is timed, peers take turns, figures follow from the counted work."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels
from benchmarks.gpu_timing import Limits
from benchmarks.kernel_case import Case
from benthic.cli.main import main

LIMITS = Limits(copy=4e12, bf16=800e12, fp8=1600e12)
SECONDS = {"benthic": 2e-3, "slow": 4e-3, "quick": 3e-3}


def case(runs=None, **changes):
    x = torch.randn(8, 8)
    expected = x + 1
    runs = runs or {name: lambda: x + 1 for name in ("benthic", "slow", "quick")}
    fields = {
        "operation": "add", "shape": "8x8", "runs": runs, "bytes": 4_000_000_000, "tolerance": 1e-6,
        "check": lambda found: ((found - expected).norm() / expected.norm()).item(),
    }  # fmt: skip
    return Case(**(fields | changes))


class Watch:
    """Injected times: known seconds by subject, and a record of who ran when."""

    def __init__(self, case, seconds=SECONDS):
        self.names = {id(run): name for name, run in case.runs.items()}
        self.seconds, self.turns = seconds, []

    def __call__(self, call, samples):
        name = self.names[id(call)]
        self.turns.append(name)
        # Of an odd number of samples one is far off, as a busy moment is; a median does not see it.
        return [self.seconds[name]] * (samples - 1) + [1.0]


def run(one, watch=None, **options):
    watch = watch or Watch(one)
    return kernels.run_case(one, kernels.Options(**options), watch, LIMITS), watch


def test_figures_follow_from_bytes_and_seconds():
    row, _ = run(case())
    ours = row["subjects"]["benthic"]
    assert ours["seconds"] == 2e-3
    assert ours["gigabytes_per_second"] == pytest.approx(2000)
    assert ours["share_of_copy_rate"] == pytest.approx(0.5)
    assert ours["share_of_limit"] == pytest.approx(0.5)
    assert "tflops" not in ours
    assert row["best_peer"] == "quick"
    assert row["times_best_peer"] == pytest.approx(1.5)


@pytest.mark.parametrize(("unit", "share"), [("bf16", 1.0), ("fp8", 0.5)])
def test_flops_are_held_against_their_unit_s_rate(unit, share):
    row, _ = run(case(bytes=1, flops=1_600_000_000_000, unit=unit))
    ours = row["subjects"]["benthic"]
    assert ours["tflops"] == pytest.approx(800)
    assert ours["share_of_matmul_rate"] == pytest.approx(share)
    assert ours["share_of_limit"] == pytest.approx(share)


def test_another_way_of_ours_is_no_peer():
    x = torch.randn(8, 8)
    one = case({name: lambda: x + 1 for name in ("benthic", "benthic, narrow", "slow")}, check=lambda found: 0.0)
    row, _ = run(one, Watch(one, SECONDS | {"benthic, narrow": 1e-3}))
    assert row["best_peer"] == "slow"


def test_peers_can_be_left_out():
    row, watch = run(case(), without=("slow", "benthic"))
    assert set(watch.turns) == set(row["subjects"]) == {"benthic", "quick"}


def test_subjects_take_turns_in_rounds():
    _, watch = run(case(), rounds=2)
    assert watch.turns == ["benthic", "slow", "quick"] * 2


def test_what_is_wrong_is_never_timed():
    x = torch.randn(8, 8)
    wrong = case()
    runs = {"benthic": lambda: x, "slow": wrong.runs["slow"], "quick": lambda: torch.full((8, 8), torch.nan)}
    wrong = case(runs, check=wrong.check)
    row, watch = run(wrong, Watch(wrong))
    assert set(watch.turns) == {"slow"}
    assert "wrong: relative error" in row["subjects"]["benthic"]["error"]
    assert "wrong: relative error nan" in row["subjects"]["quick"]["error"]
    assert "best_peer" not in row


def test_a_subject_that_raises_is_a_row_and_the_others_go_on():
    def broken():
        raise RuntimeError("no kernel image")

    good = case()
    one = case({"benthic": good.runs["benthic"], "quick": broken}, check=good.check)
    row, _ = run(one, Watch(one))
    assert row["subjects"]["quick"] == {"error": "RuntimeError: no kernel image"}
    assert row["subjects"]["benthic"]["seconds"] == 2e-3
    assert kernels.failures({"cases": [row]}) == []


def test_a_topic_that_dies_or_never_ends_keeps_its_rows_and_says_so(monkeypatch):
    def process(command, timeout, **options):
        topic, path = command[3], Path(command[5])
        path.write_text(json.dumps({"topic": topic, "limits": None, "cases": [{"operation": "add"}]}))
        if topic == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=-6)

    monkeypatch.setattr(subprocess, "run", process)
    options = kernels.Options(topic_seconds=9)
    assert [row.get("error") for row in kernels._in_process("dies", options)["cases"]] == [
        None, "its process ended with code -6"
    ]  # fmt: skip
    assert kernels._in_process("hangs", options)["cases"][1]["error"] == "stopped after 9 s"


@pytest.fixture
def topic(monkeypatch):
    def install(cases):
        monkeypatch.setattr(kernels, "import_module", lambda name: SimpleNamespace(cases=cases))

    return install


def run_topic(only=()):
    kept = []
    document = kernels.run_topic(
        "sums", kernels.Options(only=only), lambda call, samples: [1e-3] * samples, LIMITS, "cpu",
        lambda document: kept.append(json.loads(json.dumps(document))),
    )  # fmt: skip
    return document, kept


def test_a_topic_that_breaks_keeps_what_it_had_and_says_so(topic):
    def cases(device):
        yield case()
        raise ValueError("no such shape")

    topic(cases)
    document, kept = run_topic()
    assert [row.get("error") for row in document["cases"]] == [None, "ValueError: no such shape"]
    assert len(kept[0]["cases"]) == 1
    assert kernels.failures(document) == ["sums: ValueError: no such shape"]


def test_only_picks_cases_by_a_piece_of_their_name_or_topic(topic):
    topic(lambda device: iter([case(), case(operation="norm", shape="4x4")]))
    assert [row["operation"] for row in run_topic(only=("norm",))[0]["cases"]] == ["norm"]
    assert [row["operation"] for row in run_topic(only=("8x8",))[0]["cases"]] == ["add"]
    assert len(run_topic(only=("sum",))[0]["cases"]) == 2


def test_the_table_tells_speed_spread_ratio_and_failures():
    row, _ = run(case())
    text = kernels.table({"cases": [row, {"topic": "sums", "operation": "sums", "shape": "", "error": "stopped"}]})
    (ours,) = [line for line in text.splitlines() if "benthic" in line]
    assert "2000.0 us" in ours
    assert "2000 GB/s" in ours
    assert "50% of limit" in ours
    assert "1.50x quick" in ours
    assert text.endswith("sums: stopped\n2 cases, 1 failed\n")


def test_the_first_run_must_be_benthic():
    with pytest.raises(ValueError, match="the first run of add 8x8 must be benthic, not"):
        case({"quick": lambda: None, "benthic": lambda: None})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_is_refused(capsys):
    assert main(["bench", "kernels"]) == 2
    told = capsys.readouterr().err
    assert "a kernel is timed on a GPU, and torch" in told
    assert "benthic doctor" in told


def test_every_topic_has_cases():
    from importlib import import_module

    for topic in kernels.topics():
        assert callable(import_module(f"benchmarks.cases.{topic}").cases), topic


def test_topics_alone_are_run_where_nothing_else_is_named():
    assert kernels.chosen_topics(["step", "norm"]) == ["norm", "step"]
    assert kernels.chosen_topics(["step", "gradient norms"]) == kernels.topics()
    assert kernels.chosen_topics(()) == kernels.topics()

"""Rows of the tables from results: what stands beside what, and results that are not there yet."""

from __future__ import annotations

import json

import pytest

from benchmarks import readme_table

MACHINE = {"gpu": "NVIDIA H200", "commit": "abc", "versions": {"torch": "2.11.0", "triton": "3.6.0"}}


def arm(speed, trainer="benthic", compute="bfloat16", states="float32", model="lite", **more):
    fields = {"trainer": trainer, "model": model, "compute": compute, "states": states, "compiled": False}
    return {
        "arm": fields | {"attention": "flex"}, "machine": MACHINE, "tokens_per_second": speed, "tflops": 400.0,
        "memory": {"reserved_gib": 80.0},
    } | more  # fmt: skip


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)

    def keep(name, document):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name} | document))
        return list(readme_table.rows(tmp_path / f"{name}.json"))

    return keep


def test_an_arm_stands_beside_the_peer_with_its_states(results):
    rows = results("train_gpu", {"arms": {
        "bf16": arm(75_000.0),
        "torchtitan": arm(50_000.0, "torchtitan", version="0.2.2", memory={"reserved_gib": 100.0}),
        "float8": {"arm": arm(1)["arm"], "error": "no kernel image"},
    }})  # fmt: skip
    speed, memory = rows
    assert speed == (
        "| training, lite, bf16, float32 moments, beside torchtitan 0.2.2 mixed precision "
        "| 75,000 tokens/s, 400 TFLOP/s | 50,000 | 1.50 | NVIDIA H200, torch 2.11.0 | abc |"
    )
    assert "80.0 GiB | 100.0 GiB | 0.80" in memory


def test_float8_stands_beside_our_own_bf16(results):
    rows = results("train_gpu", {"arms": {
        "v3-bf16": arm(30_000.0, states="bfloat16", model="v3"),
        "v3-float8": arm(39_000.0, compute="float8", states="bfloat16", model="v3"),
    }})  # fmt: skip
    assert [row.split(" | ")[:1] + row.split(" | ")[3:4] for row in rows] == [
        ["| training, v3, float8, bfloat16 moments, beside its own bf16", "1.30"]
    ]


def test_kernels_stand_beside_their_fastest_peer_or_the_limit(results):
    subjects = {"benthic": {"seconds": 1e-3, "share_of_limit": 0.9}, "torch": {"seconds": 2e-3}}
    case = {"operation": "norm", "shape": "8x8", "bytes": 4e9, "flops": 0, "floor_seconds": 9e-4, "subjects": subjects}
    rows = results("kernels", {"machine": MACHINE, "cases": [
        case | {"best_peer": "torch", "times_best_peer": 2.0},
        case | {"flops": 1e12, "subjects": {"benthic": subjects["benthic"]}},
        {"operation": "broken", "shape": "", "error": "no such shape"},
    ]})  # fmt: skip
    assert len(rows) == 2
    assert "| norm 8x8 | 4.00 TB/s (90% of the limit) | torch: 2.00 TB/s | 2.00 |" in rows[0]
    assert "| 1,000 TFLOP/s (90% of the limit) | limit: 1,111 TFLOP/s | 0.90 |" in rows[1]


def test_losses_in_fp8_stand_beside_bf16_s(results):
    apart = {"mean_difference_of_last_tenth_percent": -0.1234}
    summary = {
        "bfloat16": {"updates": 1100, "last_smoothed_loss": 2.5},
        "float8": {"updates": 1100, "last_smoothed_loss": 2.501} | apart,
    }
    (row,) = results("fp8_loss", {"summary": summary, "arms": {"float8": {"machine": MACHINE, "gpu": "NVIDIA H200"}}})
    assert row.startswith(
        "| loss after 1,100 updates of 0.55 B parameters in FP8 | 2.5010 | bf16: 2.5000 | -0.123% over"
    )


def test_what_a_server_adds_is_shown_beside_the_engine_alone(results):
    spread = {"median": 0.1, "least": -0.01, "most": 0.2}
    speeds = {name: {"median": 1000.0} for name in ("alone_tokens_per_second", "served_tokens_per_second")}
    result = {"workload": {"clients": 32, "new_tokens": 128}, "machine": MACHINE | {"cores": 2, "processor": "CPU (x)"}}
    (row,) = results("server_overhead", result | {"summary": speeds | {"added_share": spread}})
    assert "| 10.0% added (-1.0% to 20.0%) | 2 CPU cores (CPU)" in row


def test_results_that_are_not_there_yet_leave_no_row(results):
    assert readme_table.headlines() == "\n".join(readme_table.HEADER)


@pytest.mark.parametrize("name", readme_table.HEADLINES)
def test_every_headline_names_a_row_of_its_result(name):
    path = readme_table.RESULTS / f"{name}.json"
    if not path.exists() or name == "train_gpu":
        pytest.skip("not measured yet, or its arms were not all measured")
    found = list(readme_table.rows(path))
    for start in readme_table.HEADLINES[name]:
        assert any(row.startswith(f"| {start}") for row in found), start


def test_an_arm_that_was_not_measured_leaves_no_headline(results):
    results(
        "train_gpu", {"arms": {"v3-bf16": arm(1.0, model="v3"), "v3-float8": arm(1.3, compute="float8", model="v3")}}
    )
    (found,) = readme_table.headlines().splitlines()[2:]
    assert found.startswith("| training, v3, float8")

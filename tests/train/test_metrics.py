"""Rows of metrics, shown and written: what is counted, what is None, which device's peak is meant."""

import io
import logging

import pytest
import torch
from rich.console import Console

from benthic.plan.devices import find_device
from benthic.plan.flops import training_flops_per_token
from benthic.train import metrics, progress
from benthic.train.metrics import Meter, peak_flops
from benthic.train.progress import clock, shown
from benthic.train.step import Update
from tests.train.small import small_model

CPU = torch.device("cpu")
LOADS = {1: torch.tensor([8, 0, 4, 4]), 2: torch.tensor([4, 4, 4, 4])}


def an_update(step=5, loads=LOADS):
    return Update(step, 100, 1e-3, 2.5, 2.75, 1e-4, 0.5, loads)


def test_a_row_holds_the_mean_violation_and_the_dead_experts():
    row = Meter(small_model(), 16, CPU, "float32").row(an_update(), 500)
    assert (row["step"], row["tokens"], row["loss"], row["mtp_loss"], row["lr"]) == (5, 500, 2.5, 2.75, 1e-3)
    assert row["max_violation"] == pytest.approx(0.5)
    assert row["dead_experts"] == 1
    assert row["mfu"] is None
    assert row["memory_gib"] > 0.01


def test_what_a_dense_model_does_not_have_is_none():
    dense = small_model(n_routed_experts=None, n_shared_experts=0, num_nextn_predict_layers=0)
    row = Meter(dense, 16, CPU, "float32").row(an_update(loads={}), 500)
    assert [row[name] for name in ("mtp_loss", "balance_loss", "max_violation", "dead_experts")] == [None] * 4


@pytest.mark.parametrize(
    ("name", "device"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100")]
)
def test_a_gpus_peak_is_the_planners(monkeypatch, name, device):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), "bfloat16") == find_device(device).peak["bf16"]


def test_a_gpu_that_the_planner_does_not_list_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Somebody's GPU")
    assert peak_flops(torch.device("cuda"), "bfloat16") is None


def test_mfu_is_speed_times_flops_over_peak_and_pauses_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda device, compute: 1e9)
    meter = Meter(small_model(), 16, CPU, "float32")
    meter.count(an_update())
    now[0] = 4.0
    paused = meter.pause()
    now[0] = 9.0
    meter.unpause(paused)
    row = meter.row(an_update(), 100)
    assert row["tokens_per_second"] == 25.0
    assert row["mfu"] == pytest.approx(25 * training_flops_per_token(small_model(), 16, include_mtp=True) / 1e9)


def test_lines_say_the_step_the_loss_and_the_time_left(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    row = Meter(small_model(), 16, CPU, "float32").row(an_update(), 500)
    with caplog.at_level(logging.INFO, "benthic"), shown(20, 0) as display:
        now[0] = 10.0
        display.row(row)
    assert "step 5/20  loss 2.500  mtp 2.750  lr 1.00e-03  MaxVio 0.50" in caplog.text
    assert "left 0:30" in caplog.text


def test_a_terminal_gets_a_bar_and_notes_above_it(monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=100, no_color=True)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    monkeypatch.setattr(progress.logger, "isEnabledFor", lambda level: True)
    with shown(20, 0) as display:
        display.updated(an_update(), 1234.0)
        display.note("validation [at] step 5")
    assert "validation [at] step 5" in written.getvalue()
    assert "5/20" in written.getvalue()
    assert "1,234 tokens/s" in written.getvalue()


def test_clock_reads_like_a_clock():
    assert [clock(seconds) for seconds in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]

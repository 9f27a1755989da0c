"""How threads wait: decided by who else runs, and never against the user."""

import os

from benthic.cli import threads


def statistics(tmp_path, running):
    path = tmp_path / "stat"
    path.write_text(f"cpu  1 2 3\nprocs_running {running}\nprocs_blocked 0\n")
    return path


def test_threads_sleep_beside_other_work_and_say_so(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(threads, "_STATISTICS", statistics(tmp_path, 3))
    monkeypatch.setattr(threads.logger, "propagate", True)
    with caplog.at_level("INFO", logger="benthic"):
        threads.choose_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "2.0 other processes" in caplog.text


def test_alone_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(threads, "_STATISTICS", statistics(tmp_path, 1))
    threads.choose_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_what_the_user_chose_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(threads, "_STATISTICS", statistics(tmp_path, 9))
    threads.choose_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"

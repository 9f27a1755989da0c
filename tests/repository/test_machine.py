"""What is written beside measured numbers."""

import subprocess

from benchmarks import machine


def test_the_commit_is_the_environment_s_where_no_repository_came_along(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.delenv("BENTHIC_COMMIT", raising=False)
    assert machine.commit() == "no git checkout"
    monkeypatch.setenv("BENTHIC_COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"


def test_without_git_the_commit_is_the_environment_s(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setenv("BENTHIC_COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"

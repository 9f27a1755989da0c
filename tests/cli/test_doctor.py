"""benthic doctor: what it finds, and what it calls a problem."""

import json
import shutil
from collections import namedtuple

from benthic.cli import doctor


def test_a_healthy_machine_has_no_problem(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["device"]["kind"] in ("cpu", "cuda")
    assert found["packages"]["torch"]


def test_a_missing_package_is_a_problem_with_its_command(monkeypatch, capsys):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "safetensors" else real(name))
    assert doctor.main([]) == 1
    assert "problem: safetensors is missing: pip install safetensors" in capsys.readouterr().out


def test_an_absent_extra_is_advice_only(monkeypatch, capsys):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "pyarrow" else real(name))
    assert doctor.main([]) == 0
    assert "optional: pyarrow is absent (parquet as training data)" in capsys.readouterr().out


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert any("GiB free" in text for text in doctor.examine(tmp_path)["problems"])

"""Files are whole or absent."""

import errno
import os

import pytest

from benthic.errors import CapacityError, DataError, RunError
from benthic.files import atomic_file, write_atomic


def test_content_appears_under_its_name_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "new" / "a.txt", "é")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, CapacityError), (errno.EACCES, DataError)])
def test_refusals_are_clear_errors(tmp_path, monkeypatch, number, kind):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("benthic.files.os.replace", refuse)
    with pytest.raises(kind, match=f"cannot write .*a.txt: {os.strerror(number)}"):
        write_atomic(tmp_path / "a.txt", "x", DataError)
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_atomic(tmp_path / "file" / "a.txt", "x")

"""`benthic convert` from the outside."""

import argparse

import pytest

from benthic.checkpoint import open_checkpoint, write_checkpoint
from benthic.cli import convert
from benthic.cli.main import main
from tests.checkpoint.folders import TINY, random_tensors


@pytest.fixture
def source(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "source")
    return tmp_path / "source"


def test_convert_writes_the_target_and_names_it_on_stdout(source, tmp_path, capsys):
    target = tmp_path / "target"
    arguments = [str(source), str(target), "--weights", "fp8", "--max-shard-size", "100KB", "--power-of-two-scales"]
    assert convert.main(arguments) == 0
    assert capsys.readouterr().out == f"{target}\n"
    checkpoint = open_checkpoint(target)
    assert checkpoint.config.quantization_config.scale_fmt == "ue8m0"
    assert len({entry.file for entry in checkpoint.entries.values()}) > 1


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("17", 17), ("3gib", 3 * 2**30)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert.byte_count(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 potatoes", "0.1b", "nan", "1e400"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write it like 5GB"):
        convert.byte_count(text)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--weights", "int4"], "invalid choice: 'int4'"),
        ([], "the following arguments are required: --weights"),
        (["--weights", "fp8", "--max-shard-size", "many"], "'many' is no size; write it like 5GB"),
        (["--weights", "bf16", "--power-of-two-scales"], "--power-of-two-scales belongs to --weights fp8"),
    ],
)
def test_wrong_flags_end_with_exit_code_2(source, tmp_path, capsys, extra, text):
    with pytest.raises(SystemExit) as caught:
        convert.main([str(source), str(tmp_path / "target"), *extra])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_missing_source_is_an_error_with_a_way_out(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "target"), "--weights", "bf16"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: there is no folder" in captured.err
    assert "hint: " in captured.err

"""The front door: help, unknown commands, exit codes, and no traceback for a user's mistake."""

import os
import subprocess
import sys

import pytest

from benthic import __version__
from benthic.cli.main import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert name in shown
        assert what in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_misspelt_command_is_a_hint_and_code_2(capsys):
    assert main(["gnerate"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown command 'gnerate'" in shown.err
    assert "did you mean 'generate'" in shown.err


def test_the_commands_own_errors_reach_stderr_alone(capsys):
    assert main(["plan", "deepsek-v3"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "did you mean 'deepseek-v3'" in shown.err
    assert "Traceback" not in shown.err


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "benthic", "plan", "--list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_answers_help(command):
    done = subprocess.run([sys.executable, "-m", "benthic", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: benthic" in done.stdout
    assert done.stderr == ""


def test_what_the_system_refuses_is_a_message_with_code_two(tmp_path, capsys):
    assert main(["convert", str(tmp_path), "a" * 300, "--weights", "bf16"]) == 2
    assert "error: the system refused: File name too long: 'aaa" in capsys.readouterr().err

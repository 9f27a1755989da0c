"""`benthic generate` on a folder, and its refusals."""

from __future__ import annotations

import io
import json

import pytest

from benthic.cli.main import main
from benthic.inference.pretrained import save_model
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)
    save_model(
        randomised(tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size, dtype="float32")), path, weights="fp32"
    )
    tokenizer.save(path)
    return str(path)


def test_text_goes_to_stdout_and_a_seed_repeats_it(folder, capsys):
    arguments = ["generate", folder, "--prompt", "def add", "--max-tokens", "12", "--seed", "3"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] + "\n" == first
    assert result["prompt"] == "def add"
    assert result["max_tokens"] == 12


def test_the_prompt_may_come_from_stdin_and_the_length_fits_the_model(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def add"))
    assert main(["generate", folder, "--temperature", "0", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["max_tokens"] < 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature: Input should be greater than or equal to 0"),
        (["--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (["--max-tokens", "64"], "exceed the model's 64 positions"),
        (["--device", "cuda:77"], "--device 'cuda:77' cannot be used"),
        (["--device", "gpuu"], "--device 'gpuu' cannot be used"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_no_traceback(folder, arguments, message, capsys):
    assert main(["generate", folder, "--prompt", "def", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "absent"), "--prompt", "x"]) == 2
    assert "absent" in capsys.readouterr().err


def test_the_engine_gives_what_the_plain_path_gives(folder, capsys):
    arguments = ["generate", folder, "--prompt", "def add", "--max-tokens", "12", "--seed", "3"]
    shown = []
    for more in ([], ["--plain"], ["--speculative"]):
        assert main([*arguments, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert main([*arguments, "--plain", "--regex", "a+"]) == 2
    assert "plain generation gives one answer and no more; regex is 'a+'" in capsys.readouterr().err


def test_a_file_of_prompts_becomes_a_file_of_answers(folder, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "def"}\n{"prompt": "add"}\n')
    arguments = ["generate", folder, "--input", str(source), "--output", str(output), "--max-tokens", "5", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"answered": 2, "failed": 0, "completion_tokens": 10}
    assert len(output.read_text().splitlines()) == 2
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["generate", folder, "--input", str(source)]) == 2
    assert "--input and --output belong together" in capsys.readouterr().err

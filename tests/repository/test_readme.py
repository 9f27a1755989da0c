"""What the README claims: its table is generated, its files exist, its commands are real, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import benthic
from benchmarks import readme_table
from benthic.cli.main import COMMANDS
from benthic.config import ModelConfig
from benthic.model import LanguageModel, initialise

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_tables_are_the_results():
    for path, content in readme_table.pages().items():
        assert readme_table.page_with(path.read_text(), content) == path.read_text(), path.name


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 8
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_real(words):
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    program, name, *rest = words
    if program == "make":
        assert re.search(rf"^{name}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert Path(program).name == "benthic"
    assert name in COMMANDS
    source = (ROOT / "benthic" / "cli" / f"{name}.py").read_text()
    for flag in (word for word in rest if word.startswith("--") and "." not in word):
        assert f'"{flag}"' in source or flag == "--steps" or flag.removeprefix("--") in source, flag


def test_the_python_on_the_first_screen_runs(tmp_path, monkeypatch, capsys):
    (source,) = blocks("python")
    model = LanguageModel(ModelConfig.from_pretrained("tiny"))
    initialise(model, 0)
    benthic.save_model(model, tmp_path / "runs" / "demo" / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})
    printed = re.search(r"print\(.*\)\s+# (.*)", source)
    assert capsys.readouterr().out.strip() == printed.group(1)
    assert benthic.load_model(tmp_path / "runs/demo/model-fp8", dtype=torch.float32).config == model.config.replace(
        quantization_config=benthic.load_model(tmp_path / "runs/demo/model-fp8").config.quantization_config
    )

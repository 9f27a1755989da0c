"""docs/one-token.md: every anchor exists, the walks stay short, and a real run passes through them."""

import ast
import re
import sys
from pathlib import Path

import pytest

from benthic.cli import generate, train

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "one-token.md").read_text()
WALKS = {
    "training": re.findall(r"`(\S+?)::(\S+?)`", TEXT.split("## Through generation")[0].split("## Through training")[1]),
    "generation": re.findall(r"`(\S+?)::(\S+?)`", TEXT.split("## Through generation")[1]),
}
# The best code bases of the field need 5 to 8 files and 900 to 2,000 lines for a walk, the largest 14 and 7,300.
MOST_FILES, MOST_LINES = 16, 2500


def defined(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("path", "name"), [*WALKS["training"], *WALKS["generation"]])
def test_every_anchor_resolves(path, name):
    assert name in defined(ROOT / path)


@pytest.mark.parametrize("walk", WALKS)
def test_the_walk_is_short(walk):
    files = {path for path, _ in WALKS[walk]}
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in files)
    assert len(WALKS[walk]) >= 10
    assert len(files) <= MOST_FILES
    assert lines <= MOST_LINES


def visited(call):
    """The functions of benthic that `call` enters, as (path, qualified name)."""
    seen = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "benthic")):
            path = Path(frame.f_code.co_filename).relative_to(ROOT)
            seen.add((str(path), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        assert call() == 0
    finally:
        sys.setprofile(None)
    return seen


def test_a_real_run_and_a_real_generation_pass_every_station(tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--steps", "2", "--data.procedural_bytes", "40000", "--evaluation.max_tokens", "500"]
    small += ["--evaluation.final_max_tokens", "500", "--run-folder", str(run)]
    walked = visited(lambda: train.main(["tiny", *small]))
    missed = set(WALKS["training"]) - walked
    assert not missed
    prompt = [str(run / "model"), "--prompt", "1+1", "--max-tokens", "3", "--temperature", "0"]
    walked = visited(lambda: generate.main(prompt))
    assert not set(WALKS["generation"]) - walked

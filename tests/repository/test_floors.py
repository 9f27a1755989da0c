"""Imports go down only, and siblings on one floor do not import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "benthic"
FLOORS = [
    ["config", "errors", "files", "log"],
    ["numerics", "plan", "text"],
    ["kernels"],
    ["ops"],
    ["parallel"],
    ["model", "checkpoint", "data"],
    ["train", "inference"],
    ["serve", "study", "recipes"],
    ["cli"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Floor 0 is one room: config and files report through errors.
WITHIN_FLOOR_0 = {"config", "errors", "files", "log"}


def imported_parts(tree: ast.AST):
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                modules = [f"{module}.{alias.name}" for alias in names]
            case _:
                continue
        yield from ((node.lineno, name.split(".")[1]) for name in modules if name.startswith("benthic."))


def wrong_imports(here: str, tree: ast.AST):
    for line, there in imported_parts(tree):
        if there in (here, "__version__") or {here, there} <= WITHIN_FLOOR_0:
            continue
        if FLOOR_OF[there] >= FLOOR_OF[here]:
            yield f"line {line}: {here} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]})"


def test_imports_go_down_only():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        wrong += [f"{path}: {text}" for text in wrong_imports(here, ast.parse(path.read_text()))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("plan", "def f():\n    from benthic.model import x\n"),
        ("plan", "from benthic.numerics import x\n"),
        ("config", "import benthic.plan.flops\n"),
    ],
)
def test_the_floor_test_catches_upward_and_sideways_imports(here, source):
    assert list(wrong_imports(here, ast.parse(source)))


def test_no_relative_imports():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "statement",
    [
        "import benthic",
        "import benthic.config.manifest, benthic.config.published",
        "import benthic.cli.main as m; assert m.main(['--help']) == 0",
        "import benthic.cli.plan as m; assert m.main(['deepseek-v3', '--json']) == 0",
        "import benthic.text",
    ],
)
def test_light_parts_do_not_import_torch(statement):
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_trainer_imports_no_compiler():
    """torch's brings Triton along, and seconds of start-up."""
    code = "import benthic.train.run, sys\nassert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

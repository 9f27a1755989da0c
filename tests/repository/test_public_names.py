"""The names a user may import are the ones that exist, and no more are promised."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import benthic
from benthic.cli.main import COMMANDS

ROOT = Path(__file__).parents[2] / "benthic"


@pytest.mark.parametrize("name", benthic.__all__)
def test_every_public_name_resolves(name):
    assert getattr(benthic, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        _ = benthic.Enigne


def test_every_command_has_a_module_and_every_module_a_command():
    shared = {"__init__", "api_key", "engine_options", "main", "remote", "terminal", "threads"}
    modules = {path.stem for path in (ROOT / "cli").glob("*.py")} - shared
    assert modules == set(COMMANDS)
    for name in COMMANDS:
        assert callable(import_module(f"benthic.cli.{name}").main)


def packages():
    return sorted(path.parent for path in ROOT.rglob("__init__.py") if path.parent != ROOT)


@pytest.mark.parametrize("folder", packages(), ids=lambda path: path.name)
def test_every_package_says_what_it_is(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_all_lists_are_sorted_and_complete():
    for path in ROOT.rglob("*.py"):
        dotted = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        names = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assign)]
        if not any(isinstance(t, ast.Name) and t.id == "__all__" for n in names for t in n.targets):
            continue
        module = import_module(dotted)
        for name in module.__all__:
            assert hasattr(module, name), f"{dotted}.{name}"

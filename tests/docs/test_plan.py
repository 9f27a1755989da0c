"""docs/plan.md: its commands parse, its keys exist."""

import re
from pathlib import Path

import pytest

from benthic.cli.plan import main, make_parser
from benthic.config import ModelConfig
from benthic.plan.plan import make_plan
from benthic.plan.request import PlanRequest

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^benthic plan (.+)$", PAGE, re.MULTILINE)
KEYS = re.findall(r"`((?:parameters|kv_cache|flops|memory|serving|training|cost)\.[\w.]+)`", PAGE)


@pytest.fixture(scope="module")
def plan():
    return make_plan(ModelConfig.from_pretrained("deepseek-v3"), PlanRequest())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_the_page_parses(command):
    assert make_parser().parse_args(command.split())


@pytest.mark.parametrize("command", [one for one in COMMANDS if "--device" in one])
def test_the_long_commands_run(command, capsys):
    assert main([*command.split(), "--json"]) == 0


@pytest.mark.parametrize("key", KEYS)
def test_every_key_on_the_page_exists(key, plan):
    found = plan
    for part in key.split("."):
        found = found[part]
    assert found is not None


def test_the_page_shows_the_main_options():
    shown = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    options = {option for action in make_parser()._actions for option in action.option_strings}
    assert shown <= options
    assert {"--explain", "--json", "--compare", "--plot", "--device", "--layout", "--context", "--batch"} <= shown
    assert len(KEYS) > 40

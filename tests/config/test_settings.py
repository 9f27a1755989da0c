"""Errors and settings: the text users meet."""

import pickle
import re

import pytest

from benthic.config.settings import Settings
from benthic.config.yaml_text import read_yaml
from benthic.errors import BenthicError, ConfigError, NumericsError, did_you_mean


class Small(Settings):
    size: int = 1
    name: str = "a"
    share: float = 0.5


def test_wrong_values_and_unknown_keys_are_config_errors():
    with pytest.raises(ConfigError, match="size: Input should be a valid integer"):
        Small(size="many")
    with pytest.raises(ConfigError, match="unknown key 'sise' in Small\nhint: did you mean 'size'"):
        Small(sise=3)
    with pytest.raises(ConfigError, match="did you mean 'name'"):
        Small().replace(nam="b")


def test_a_key_named_self_and_numbers_without_end_are_refused():
    with pytest.raises(ConfigError, match="unknown key 'self' in Small"):
        Small(**{"self": 1})
    with pytest.raises(ConfigError, match=r"share: Input should be a finite number \(given inf\)"):
        Small(share=float("inf"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{1: 2}", "--a: key 1 is a int; keys are names of settings"),
        ("a: [{null: 3}]", "--a: key None is a NoneType"),
        ("2026-13-01", "cannot read --a: it is not valid YAML: month must be in 1..12"),
        ("[" * 3000, "cannot read --a: it is YAML nested too deeply, or holds itself"),
        ("&a [*a]", "cannot read --a: it is YAML nested too deeply, or holds itself"),
        ("[1", "cannot read --a: it is not valid YAML: while parsing a flow sequence"),
        ("!!python/object:os.system x", "cannot read --a: it is not valid YAML: could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_tree_of_settings_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_yaml(text, "--a")


def test_replace_validates_again():
    assert Small().replace(size=2) == Small(size=2)
    with pytest.raises(ConfigError):
        Small().replace(size="x")


def test_errors_survive_pickling_with_their_hint():
    error = pickle.loads(pickle.dumps(ConfigError("wrong", hint="do this")))
    assert str(error) == "wrong\nhint: do this"
    assert isinstance(error, ConfigError)


def test_exit_codes():
    assert BenthicError("x").exit_code == 2
    assert NumericsError("x").exit_code == 3


def test_far_names_get_the_list():
    assert did_you_mean("zzzz", ["b", "a"]) == "allowed: a, b"

"""Errors and settings: the text users meet."""

import pickle

import pytest

from benthic.config.settings import Settings
from benthic.errors import BenthicError, ConfigError, NumericsError, did_you_mean


class Small(Settings):
    size: int = 1
    name: str = "a"


def test_wrong_values_and_unknown_keys_are_config_errors():
    with pytest.raises(ConfigError, match="size: Input should be a valid integer"):
        Small(size="many")
    with pytest.raises(ConfigError, match="unknown key 'sise' in Small\nhint: did you mean 'size'"):
        Small(sise=3)
    with pytest.raises(ConfigError, match="did you mean 'name'"):
        Small().replace(nam="b")


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

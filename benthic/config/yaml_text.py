"""YAML as plain data, for config files and the values of dotted overrides."""

from __future__ import annotations

from typing import Any

import yaml

from benthic.errors import ConfigError


def read_yaml(text: str, where: str) -> Any:
    """The data that a YAML text states: plain values, lists, and mappings whose keys are text; else ConfigError."""
    try:
        data = yaml.safe_load(text)
        _refuse_other_keys(data, where)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"cannot read {where}: it is YAML nested too deeply, or holds itself") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-13-01 looks like a date and is none
        raise ConfigError(f"cannot read {where}: it is not valid YAML: {' '.join(str(error).split())}") from None
    return data


def _refuse_other_keys(data: Any, where: str) -> None:
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    for key in data if isinstance(data, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{where}: key {key!r} is a {type(key).__name__}; keys are names of settings")
    for child in children:
        _refuse_other_keys(child, where)

"""Dotted overrides: `optimizer.weight_decay = 0` on any tree of Settings, with the nearest name for a misspelt one.

One walk over the fields instead of a command-line flag for each: a training config has about a hundred leaves, and
`--help` should name the recipe's own words, not all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from benthic.config.settings import Settings, refuse_unknown_keys
from benthic.config.yaml_text import read_yaml
from benthic.errors import ConfigError

S = TypeVar("S", bound=Settings)


def override(config: S, values: Mapping[str, str]) -> S:
    """`config` with each dotted path set to its text, read as YAML (`1e-3`, `true`, `null`, `[a, b]`).

    Raises ConfigError for an unknown name, naming the level it stands on, and for a value the field refuses.
    """
    tree = config.model_dump(mode="json")
    for path, text in values.items():
        _set(tree, path, read_yaml(text, f"the value of --{path}"))
    return type(config)(**tree)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    level: Any = tree
    walked: list[str] = []
    for name in parents:
        level = _child(level, name, walked)
        walked.append(name)
    _child(level, leaf, walked)
    level[int(leaf) if isinstance(level, list) else leaf] = value


def _child(level: Any, name: str, walked: list[str]) -> Any:
    where = ".".join(walked) or "the training config"
    if isinstance(level, list):
        if not name.isdigit() or int(name) >= len(level):
            raise ConfigError(f"{where} has {len(level)} entries, counted from 0; there is no {name!r}")
        return level[int(name)]
    if not isinstance(level, dict):
        raise ConfigError(f"{where} is a single value, so it has no {name!r}")
    refuse_unknown_keys([name], level, where)
    return level[name]

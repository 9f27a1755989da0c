"""The base of every configuration: frozen, unknown keys refused by name, errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from benthic.errors import ConfigError, did_you_mean


def _describe(error: ValidationError, title: str) -> str:
    lines = []
    for one in error.errors(include_url=False):
        path = ".".join(str(part) for part in one["loc"]) or title
        text = one["msg"].removeprefix("Value error, ")
        given = one.get("input")
        shown = f" (given {_clipped(given)})" if one["loc"] and not isinstance(given, Mapping) else ""
        lines.append(f"{path}: {text}{shown}")
    return "; ".join(lines)


def _clipped(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:200]}..."


class Settings(BaseModel):
    """Frozen data. A wrong value or an unknown key raises ConfigError, however it is built."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def __init__(self, /, **values: Any) -> None:
        refuse_unknown_keys(values, type(self).model_fields, type(self).__name__)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {_describe(error, 'settings')}") from None

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, validated again."""
        refuse_unknown_keys(changes, type(self).model_fields, type(self).__name__)
        return type(self)(**({name: getattr(self, name) for name in type(self).model_fields} | changes))


def refuse_unknown_keys(values: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise ConfigError naming the first key outside `allowed` and the nearest allowed one."""
    allowed = list(allowed)
    for name in values:
        if name not in allowed:
            raise ConfigError(f"unknown key {name!r} in {where}", hint=did_you_mean(name, allowed))


def read_text(path: Path, what: str) -> str:
    """The text of a small configuration file, or a ConfigError that says why not."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {path}: {error}") from None

"""Whole runs as functions that return a TrainConfig, by name."""

from __future__ import annotations

from collections.abc import Callable

from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, did_you_mean
from benthic.recipes.demo import demo
from benthic.recipes.published import deepseek_v3, v2_lite
from benthic.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "v2-lite": v2_lite,
    "deepseek-v3": deepseek_v3,
}


def find_recipe(name: str) -> Callable[[], TrainConfig]:
    """A recipe by name. Raises ConfigError with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise ConfigError(f"{name!r} is neither a recipe nor a config file", hint=did_you_mean(name, RECIPES))
    return RECIPES[name]

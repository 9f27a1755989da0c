"""Plans as a picture: cache against context, where memory goes. Imports matplotlib, so only `--plot` imports this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benthic.config import ModelConfig
from benthic.errors import ConfigError, RunError
from benthic.plan.kv_cache import bytes_per_token_if

FORMATS = ("png", "svg", "pdf")
KIND_COLOURS = {"mha": "#b2182b", "gqa": "#ef8a62", "mqa": "#67a9cf", "mla": "#2166ac"}
PARTS = ("routed", "shared", "dense", "attention", "embedding", "head", "router", "norm")


def plot_plans(configs: list[ModelConfig], plans: list[dict[str, Any]], path: Path) -> None:
    """Draw one or several plans into `path`, whose suffix names the format. Raises before drawing when it cannot."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"cannot plot into {path}: the suffix is {kind!r}", hint="allowed: " + ", ".join(FORMATS))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib: {error}", hint="pip install 'benthic[plot]'") from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    caches, memory = figure.subplots(1, 2)
    _draw_caches(caches, configs, plans)
    _draw_memory(memory, plans)
    _save(figure, path, kind)


def _draw_caches(axes: Any, configs: list[ModelConfig], plans: list[dict[str, Any]]) -> None:
    """Bytes of one sequence's cache: one model with each attention, or several models each with its own."""
    contexts = [2**power for power in range(10, 18)]
    if len(plans) == 1:
        sizes = bytes_per_token_if(configs[0], plans[0]["kv_cache"]["format"])
        own = configs[0].attention_kind
        for kind, size in sizes.items():
            label = f"{kind.upper()} (this model)" if kind == own else kind.upper()
            gigabytes = [size * context / 1e9 for context in contexts]
            axes.plot(contexts, gigabytes, label=label, color=KIND_COLOURS[kind], linewidth=3 if kind == own else 1.5)
    else:
        for plan in plans:
            size = plan["kv_cache"]["bytes_per_token"]
            axes.plot(contexts, [size * context / 1e9 for context in contexts], label=_name(plan))
    axes.set(xscale="log", yscale="log", xlabel="positions", ylabel="GB a sequence", title="Cache of keys and values")
    axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_memory(axes: Any, plans: list[dict[str, Any]]) -> None:
    """Parameters by part, stacked."""
    names = [_name(plan) for plan in plans]
    base = [0.0] * len(plans)
    for part in PARTS:
        sizes = [plan["parameters"][part] / 1e9 for plan in plans]
        if any(sizes):
            axes.bar(names, sizes, bottom=base, label=part, width=0.5)
            base = [below + size for below, size in zip(base, sizes, strict=True)]
    axes.set(ylabel="parameters, 10^9", title="Parameters by part")
    axes.legend()


def _name(plan: dict[str, Any]) -> str:
    return Path(plan["model"]).name


def _save(figure: Any, path: Path, kind: str) -> None:
    """Write under a temporary name in the same folder, then rename: no half picture is left under the final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            figure.savefig(file, format=kind, dpi=150)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error}", hint="name a file in a folder you may write to") from None

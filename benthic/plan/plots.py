"""Plans as a picture: cache against context, training memory by part, cost. Only `--plot` imports this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benthic.config import ModelConfig
from benthic.errors import ConfigError, RunError
from benthic.plan.devices import find_device
from benthic.plan.kv_cache import bytes_per_token_if

FORMATS = ("png", "svg", "pdf")
KIND_COLOURS = {"mha": "#b2182b", "gqa": "#ef8a62", "mqa": "#67a9cf", "mla": "#2166ac"}


def plot_plans(configs: list[ModelConfig], plans: list[dict[str, Any]], path: Path) -> None:
    """Draw one or several plans into `path`, whose suffix names the format. Raises before drawing when it cannot."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"cannot plot into {path}: the suffix is {kind!r}", hint="allowed: " + ", ".join(FORMATS))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib: {error}", hint="pip install 'benthic[plot]'") from None
    figure = Figure(figsize=(18, 5), layout="constrained")
    caches, memory, cost = figure.subplots(1, 3)
    _draw_caches(caches, configs, plans)
    _draw_memory(memory, plans)
    _draw_cost(cost, plans)
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
    """Training memory of the fullest GPU by part, under the line of what the device has."""
    _stack(axes, plans, [plan["memory"]["by_part"] for plan in plans], 1e9)
    capacity = find_device(plans[0]["training"]["device"]).memory_bytes / 1e9
    axes.axhline(capacity, color="black", linestyle="--", linewidth=1)
    axes.text(0.0, capacity, " all there is", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(ylabel="GB on the fullest GPU", title=f"Training memory, {plans[0]['training']['device']}")


def _draw_cost(axes: Any, plans: list[dict[str, Any]]) -> None:
    """Dollars of a run, by what the time goes to."""
    prices = [plan["cost"]["dollars_per_hour"] for plan in plans]
    hours = [plan["cost"]["gpu_hours_by_part"] for plan in plans]
    dollars = [{part: price * h for part, h in one.items()} for price, one in zip(prices, hours, strict=True)]
    _stack(axes, plans, dollars, 1e6)
    tokens = plans[0]["cost"]["tokens"] / 1e9
    axes.set(ylabel="million dollars", title=f"Cost of {tokens:,.0f} billion tokens")


def _stack(axes: Any, plans: list[dict[str, Any]], heights: list[dict[str, float]], unit: float) -> None:
    """A bar a plan, its parts on top of each other."""
    names = [f"{_name(plan)}\n{plan['training']['gpus']:,} GPUs" for plan in plans]
    base = [0.0] * len(plans)
    for part in dict.fromkeys(part for one in heights for part in one):
        sizes = [max(0.0, one.get(part, 0.0)) / unit for one in heights]
        axes.bar(names, sizes, bottom=base, label=part, width=0.4)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    axes.margins(x=0.4, y=0.1)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


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

"""A plan as tables on the terminal. Every number comes from the plan; nothing is computed here but ratios and units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("embedding", "head", "attention", "dense", "routed", "shared", "router", "norm")
OPERATIONS_SHOWN = 12


def print_plan(plan: dict[str, Any]) -> None:
    """All tables of one plan."""
    console = Console(highlight=False)
    console.print(f"[bold]{plan['model']}[/]: {_summary(plan)}")
    for table in (_parameters(plan), _kv_cache(plan), _flops(plan), _serving(plan), _steps(plan), *_training(plan)):
        console.print(table)
    if not plan["training"]["fits"]:
        text = f"training does not fit {plan['training']['gpus']:,} x {plan['training']['device']} laid out so"
        console.print(text, style="bold red", markup=False, soft_wrap=True)
    if not plan["serving"]["fits"]:
        console.print(_shortage(plan["serving"]), style="bold red", markup=False, soft_wrap=True)
    console.print("Assumed:")
    for text in plan["assumptions"]:
        console.print(f"  {text}", markup=False, soft_wrap=True)


def print_comparison(plans: list[dict[str, Any]]) -> None:
    """The main figures of several plans, a column each."""
    table = _table("Side by side", "", *(plan["model"] for plan in plans))
    for label, figure in _COMPARED.items():
        table.add_row(label, *(figure(plan) for plan in plans))
    Console(highlight=False).print(table)


def print_replay(replay: dict[str, Any]) -> None:
    """DeepSeek-V3's run, predicted beside published."""
    console = Console(highlight=False)
    table = _table("DeepSeek-V3's own training run", "what", "predicted", "published", "ratio")
    for one in replay["comparisons"]:
        name = f"{one['name']}, {one['unit']}"
        table.add_row(name, f"{one['predicted']:,.0f}", f"{one['published']:,.0f}", f"{one['ratio']:.3f}")
    console.print(table)
    table = _table("Pretraining at the full batch", "what", "value")
    for name, value in replay["pretraining"].items():
        table.add_row(name.replace("_", " "), value if isinstance(value, str) else f"{value:,.4g}")
    console.print(table)
    table = _table("What another assumption would do to pretraining's hours", "assumption", "change")
    for name, change in replay["effects"].items():
        table.add_row(name, f"{change:+.1%}")
    console.print(table)
    console.print("Assumed:")
    for text in replay["assumptions"]:
        console.print(f"  {text}", markup=False, soft_wrap=True)


def print_expert_load(model: str, loads: list[dict[str, Any]]) -> None:
    """Loads of experts and devices, and what a token sends, under each kind of routing."""
    first = loads[0]
    title = f"{model}: {first['tokens']:,} tokens over {first['devices']} devices on {first['nodes']} nodes"
    columns = ("routing", "group limit", "fullest expert", "fullest device", "idle", "devices a token", "nodes a token")
    table = _table(title, *columns)
    for one in loads:
        table.add_row(
            one["routing"],
            "yes" if one["group_limit"] else "no",
            f"{1 + one['max_violation']:.2f} x mean",
            f"{1 + one['device_violation']:.2f} x mean",
            str(one["idle_experts"]),
            f"{one['devices_per_token']:.2f}",
            f"{one['nodes_per_token']:.2f}",
        )
    Console(highlight=False).print(table)


def print_explanation(model: str, explanation: dict[str, Any]) -> None:
    """Formulas with their numbers, and the operations that take the most time."""
    console = Console(highlight=False)
    console.print(f"[bold]{model}: how the figures come about[/]")
    for line in explanation["lines"]:
        console.print(f"  {line['name']}", style="bold", markup=False)
        console.print(f"    = {line['formula']}", markup=False, soft_wrap=True)
        console.print(f"    = {line['numbers']}", markup=False, soft_wrap=True)
        console.print(f"    = {_exact(line['value'])} {line['unit']}", markup=False)
    for what, addends in explanation["training"].items():
        console.print(f"  training, {what}", style="bold", markup=False)
        for one in addends:
            text = f"    {one['name']} = {one['formula']} = {one['value']:,.6g} {one['unit']}"
            console.print(text, markup=False, soft_wrap=True)
    console.print("  training, assumed", style="bold", markup=False)
    for text in explanation["training_assumptions"]:
        console.print(f"    {text}", markup=False, soft_wrap=True)
    for call in ("decode", "prefill"):
        console.print(_operations(call, explanation[call]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _summary(plan: dict[str, Any]) -> str:
    built, count = plan["architecture"], plan["parameters"]
    text = f"{count['total'] / 1e9:.1f}B parameters, {built['layers']} layers, {built['attention'].upper()}"
    if built["routed_experts"]:
        text += (
            f", {built['experts_per_token']} of {built['routed_experts']} experts "
            f"and {built['shared_experts']} shared, {count['active_without_input_embedding'] / 1e9:.1f}B active a token"
        )
    return text + (f", {built['prediction_layers']} MTP layer" if built["prediction_layers"] else "")


def _shortage(serving: dict[str, Any]) -> str:
    asked = f"batch {serving['batch']} at {serving['context']:,} positions"
    fewest = serving["fewest_gpus"]
    remedy = f"{fewest} x {serving['device']} hold it" if fewest else "no power of two up to 1,024 holds it"
    return f"{asked} does not fit on {serving['gpus']} x {serving['device']}; {remedy}"


def _parameters(plan: dict[str, Any]) -> Table:
    count = plan["parameters"]
    table = _table("Parameters", "part", "elements", "share")
    for part in PARTS:
        if count[part]:
            table.add_row(part, f"{count[part]:,}", f"{count[part] / count['total']:.2%}")
    table.add_section()
    table.add_row("total", f"{count['total']:,}", "")
    table.add_row("active a token", f"{count['active']:,}", f"{count['active'] / count['total']:.2%}")
    bare = count["active_without_input_embedding"]
    table.add_row("active, input embedding left out", f"{bare:,}", f"{bare / count['total']:.2%}")
    if count["mtp_unique"]:
        table.add_row("MTP layers, not in the total", f"{count['mtp_unique']:,}", "")
        table.add_row("published folder, MTP and its copies", f"{count['stored']:,}", "")
    if plan.get("folder"):
        table.add_row("this folder, by its headers", f"{plan['folder']['parameters']:,}", "")
    return table


def _kv_cache(plan: dict[str, Any]) -> Table:
    cache = plan["kv_cache"]
    title = f"Cache of keys and values, {cache['format']}, this model with each attention"
    table = _table(title, "attention", "bytes a token", f"at {cache['context']:,} positions", "against MHA")
    compared = cache["bytes_per_token_if"]
    for kind, size in compared.items():
        own = kind == cache["kind"]
        label = f"{kind.upper()} (this model)" if own else kind.upper()
        row = (label, f"{size:,}", _bytes(size * cache["context"]), f"{size / compared['mha']:.1%}")
        table.add_row(*row, style="bold" if own else None)
    return table


def _flops(plan: dict[str, Any]) -> Table:
    flops = plan["flops"]
    table = _table("FLOPs a token", "what", "GFLOP")
    length = f"{flops['sequence_length']:,}"
    names = {
        "forward_per_token": f"forward, causal, sequences of {length}",
        "training_per_token_causal": f"training, causal attention, {length}",
        "training_per_token_full": f"training, full attention, {length}",
        "training_per_token_causal_with_mtp": "training with MTP, causal",
        "decode_per_token": f"decode at {flops['context']:,} positions",
    }
    for key, name in names.items():
        if key in flops:
            table.add_row(name, f"{flops[key] / 1e9:,.1f}")
    return table


def _serving(plan: dict[str, Any]) -> Table:
    found = plan["serving"]
    table = _table(f"Serving on {found['gpus']} x {found['device']}", "what", "value")
    table.add_row("weights in a published folder", _bytes(plan["memory"]["stored_bytes"]))
    if plan.get("folder"):
        table.add_row("weights in this folder, by their headers", _bytes(plan["folder"]["bytes"]))
    table.add_row(f"weights in {found['weights']}, MTP left out", _bytes(plan["memory"]["weights_bytes"]))
    table.add_row(f"weights on each GPU, attention by {found['attention']}", _bytes(found["weights_bytes_per_gpu"]))
    table.add_row("cache of a token on each GPU that holds it", f"{found['cache_bytes_per_token_per_gpu']:,} B")
    free = found["free_bytes_per_gpu"]
    table.add_row("left for the cache on each GPU", _bytes(free) if free > 0 else f"{_bytes(-free)} short")
    table.add_row(f"longest context that fits, batch {found['batch']}", f"{found['longest_context']:,}")
    table.add_row("longest context of the model", f"{found['longest_context_trained']:,}")
    table.add_row(f"largest batch that fits at {found['context']:,}", f"{found['largest_batch']:,}")
    seconds = found["prefill_seconds"]
    table.add_row(f"prefill of {found['batch']} x {found['context']:,} tokens, at least", _seconds(seconds))
    return table


def _steps(plan: dict[str, Any]) -> Table:
    found = plan["serving"]
    columns = ["batch", "a token takes", "tokens/s", "tokens/s a GPU"]
    has_experts, has_mtp = "experts_touched" in found["steps"][0], "speculative" in found["steps"][0]
    columns += ["experts met"] if has_experts else []
    columns += ["tokens/s with MTP"] if has_mtp else []
    table = _table(f"Decoding at {found['context']:,} positions, at best", *columns)
    for step in found["steps"]:
        row = [f"{step['batch']:,}", _seconds(step["seconds_per_token"]), f"{step['tokens_per_second']:,.0f}"]
        row.append(f"{step['tokens_per_second_per_gpu']:,.0f}")
        row += [f"{step['experts_touched']:.1f}"] if has_experts else []
        row += [f"{step['speculative']['tokens_per_second']:,.0f}"] if has_mtp else []
        table.add_row(*row)
    return table


def _training(plan: dict[str, Any]) -> Iterator[Table]:
    found, cost = plan["training"], plan["cost"]
    title = f"Training on {found['gpus']:,} x {found['device']}: memory of the fullest GPU"
    table = _table(title, "what", "bytes")
    table.caption = f"laid out as {found['layout']}"
    for part, size in plan["memory"]["by_part"].items():
        table.add_row(part, _bytes(size))
    table.add_section()
    table.add_row(f"at its highest, {found['fullest_moment']}", _bytes(plan["memory"]["training_bytes_per_gpu"]))
    yield table
    shape = f"{found['sequences']:,} sequences of {found['sequence_length']:,}, {found['precision']}"
    table = _table(f"A training step of {shape}", "what", "takes", "share")
    for part, seconds in found["step_by_part"].items():
        # What overlaps entirely leaves a rounding error.
        if seconds < 1e-9:
            continue
        table.add_row(part, _seconds(seconds), f"{seconds / found['step_seconds']:.1%}")
    table.add_section()
    table.add_row("step", _seconds(found["step_seconds"]), "")
    table.add_row("tokens/s a GPU", f"{found['tokens_per_second_per_gpu']:,.0f}", "")
    table.add_row("model FLOPs of the bf16 peak", f"{found['model_flops_utilisation']:.1%}", "")
    yield table
    price = f"{cost['dollars_per_hour']:.2f} dollars a GPU-hour"
    table = _table(f"A run of {cost['tokens'] / 1e9:,.0f} billion tokens at {price}", "what", "value")
    table.add_row("GPU-hours", f"{cost['gpu_hours']:,.0f}")
    table.add_row("dollars", f"{cost['dollars']:,.0f}")
    table.add_row("days", f"{cost['days']:,.1f}")
    yield table


def _operations(call: str, operations: list[dict[str, Any]]) -> Table:
    whole = sum(one["seconds"] for one in operations)
    title = f"Longest operations of a {call} on the busiest GPU ({_seconds(whole)} in all, links apart)"
    table = _table(title, "operation", "times", "GFLOP", "GB", "FLOP/B", "takes", "bound by")
    ranked = sorted(operations, key=lambda one: -one["seconds"])[:OPERATIONS_SHOWN]
    for one in ranked:
        table.add_row(
            one["name"].removeprefix("self_attn.").removeprefix("mlp."),
            f"{one['count']}",
            f"{one['flops'] / 1e9:,.1f}",
            f"{one['bytes'] / 1e9:,.3f}",
            f"{one['flops_per_byte']:,.0f}",
            _seconds(one["seconds"]),
            one["bound"],
        )
    return table


_COMPARED = {
    "parameters": lambda plan: f"{plan['parameters']['total']:,}",
    "active, input embedding left out": lambda plan: f"{plan['parameters']['active_without_input_embedding']:,}",
    "layers": lambda plan: str(plan["architecture"]["layers"]),
    "attention": lambda plan: plan["kv_cache"]["kind"].upper(),
    "cache elements a token": lambda plan: f"{plan['kv_cache']['elements_per_token']:,}",
    "cache bytes a token": lambda plan: f"{plan['kv_cache']['bytes_per_token']:,}",
    "training GFLOP a token, causal": lambda plan: f"{plan['flops']['training_per_token_causal'] / 1e9:,.1f}",
    "decode GFLOP a token": lambda plan: f"{plan['flops']['decode_per_token'] / 1e9:,.1f}",
    "weights in memory": lambda plan: f"{_bytes(plan['memory']['weights_bytes'])} {plan['serving']['weights']}",
    "GPUs to serve": lambda plan: f"{plan['serving']['gpus']} x {plan['serving']['device']}",
    "longest context that fits": lambda plan: f"{plan['serving']['longest_context']:,}",
    "largest batch that fits": lambda plan: f"{plan['serving']['largest_batch']:,}",
    "a token takes to decode, at least": lambda plan: _seconds(plan["serving"]["steps"][0]["seconds_per_token"]),
    "GPUs to train": lambda plan: f"{plan['training']['gpus']:,} x {plan['training']['device']}",
    "training memory of the fullest GPU": lambda plan: _bytes(plan["memory"]["training_bytes_per_gpu"]),
    "training tokens/s a GPU": lambda plan: f"{plan['training']['tokens_per_second_per_gpu']:,.0f}",
    "GPU-hours of the run": lambda plan: f"{plan['cost']['gpu_hours']:,.0f}",
    "dollars": lambda plan: f"{plan['cost']['dollars']:,.0f}",
}


def _bytes(size: float) -> str:
    """Decimal units: the published figures are in them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:,.2f} ms" if value >= 1e-3 else f"{value * 1e6:,.1f} us"


def _exact(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4f}"

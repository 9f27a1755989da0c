"""`benthic plan MODEL`: parameters, FLOPs, KV cache, memory, layout, time and cost, before anything runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from benthic.config import ModelConfig
from benthic.config.published import preset_names
from benthic.errors import ConfigError
from benthic.plan.devices import DEVICES
from benthic.plan.kv_cache import CACHE_FORMATS
from benthic.plan.layout import OBJECTIVES
from benthic.plan.operations import RECOMPUTATIONS
from benthic.plan.parameters import WEIGHT_FORMATS
from benthic.plan.plan import explain_plan, make_plan, plan_expert_load
from benthic.plan.request import PlanRequest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="benthic plan --help lists what is allowed")


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of a plan are named as in PlanRequest."""
    parser = _Parser(prog="benthic plan", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="preset name, folder with config.json, or such a file"
    )
    parser.add_argument("--list", action="store_true", help="names of presets and devices")
    parser.add_argument("--expert-load", action="store_true", help="simulate how evenly MODEL's experts are chosen")
    parser.add_argument("--replay", action="store_true", help="predict DeepSeek-V3's own run beside its published cost")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="put these beside MODEL")
    parser.add_argument("--explain", action="store_true", help="each figure as formula = numbers = value")
    parser.add_argument("--json", action="store_true", help="machine-readable, keys fixed")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of cache, memory and cost (png, svg or pdf)")
    plan = parser.add_argument_group("what is planned")
    plan.add_argument("--device", metavar="NAME", help=f"{', '.join(sorted(DEVICES))} (default h100)")
    plan.add_argument("--gpus", type=int, help="all there are (default: the fewest that do)")
    serve = parser.add_argument_group("serving")
    serve.add_argument("--context", type=int, help="positions in the cache while decoding (default 4096)")
    serve.add_argument("--batch", type=int, help="sequences served at a time (default: a sweep)")
    serve.add_argument("--serving-gpus", type=int, help="how many serve the model (default: the fewest that hold it)")
    serve.add_argument("--attention", choices=["tensor", "data"], help="how attention is spread over GPUs")
    serve.add_argument("--weights", choices=WEIGHT_FORMATS, help="format of weights in memory (default: as stored)")
    serve.add_argument("--cache", choices=CACHE_FORMATS, help="format of the cache (default bf16)")
    serve.add_argument("--acceptance", type=float, help="share of MTP drafts accepted (default 0.85)")
    train = parser.add_argument_group("training")
    train.add_argument("--layout", metavar="AXES", help='such as "pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64"')
    train.add_argument("--objective", choices=OBJECTIVES, help="search all layouts (default: the best of a few)")
    train.add_argument("--sequence-length", type=int, help="tokens in a sequence (default 4096)")
    train.add_argument("--sequences", type=int, help="sequences in a step, all GPUs together")
    train.add_argument("--micro-batch", type=int, help="sequences a GPU works on at a time (default 1)")
    train.add_argument("--precision", choices=["bf16", "fp8", "fp32"], help="of matrix products (default: as stored)")
    train.add_argument("--recomputation", choices=RECOMPUTATIONS, help="in the backward (default: the least that fits)")
    train.add_argument("--tokens", type=float, help="of the whole run (default 1e12)")
    train.add_argument("--dollars-per-hour", type=float, help="price of a GPU (default: the device's)")
    return parser


def main(arguments: list[str]) -> int:
    """Print a plan, or several side by side."""
    options = make_parser().parse_args(arguments)
    _refuse_ignored(options)
    if options.list:
        _list(options.json)
        return 0
    if options.replay:
        if options.model not in (None, "deepseek-v3"):
            raise ConfigError(f"--replay predicts the run of deepseek-v3; MODEL is {options.model!r}")
        _replay(options.json)
        return 0
    if options.model is None:
        raise ConfigError("no MODEL given", hint="benthic plan --list shows the presets")
    if options.expert_load:
        _expert_load(options.model, options.json)
        return 0
    given = {name: getattr(options, name) for name in PlanRequest.model_fields}
    request = PlanRequest(**{name: value for name, value in given.items() if value is not None})
    names = [options.model, *options.compare]
    configs = [ModelConfig.from_pretrained(name) for name in names]
    plans = [make_plan(config, request, name) for config, name in zip(configs, names, strict=True)]
    for plan, name in zip(plans, names, strict=True):
        plan["folder"] = weights_found(Path(name))
    if options.plot:
        from benthic.plan.plots import plot_plans

        plot_plans(configs, plans, options.plot)
    explanations = [explain_plan(config, request) for config in configs] if options.explain else []
    if options.json:
        _print_json(plans, explanations)
    else:
        _print_tables(plans, explanations)
    return 0


def _refuse_ignored(options: argparse.Namespace) -> None:
    """A fixed question takes no settings of a plan; one that did nothing would look answered."""
    asked = next((name for name in ("list", "replay", "expert_load") if getattr(options, name)), None)
    settings = (*PlanRequest.model_fields, "compare", "explain", "plot")
    ignored = [name for name in settings if getattr(options, name) not in (None, False, [])]
    if asked and ignored:
        named = ", ".join("--" + name.replace("_", "-") for name in ignored)
        raise ConfigError(f"--{asked.replace('_', '-')} takes no settings; {named} would do nothing")


def weights_found(folder: Path) -> dict[str, Any] | None:
    """What a model folder's weights really take, from their headers, to stand beside what the plan says they would."""
    if not any(folder.glob("*.safetensors")):
        return None
    from benthic.checkpoint.folder import read_entries, total_bytes
    from benthic.checkpoint.layout import SCALE_SUFFIX

    entries = read_entries(folder)
    elements = sum(entry.size for name, entry in entries.items() if not name.endswith(SCALE_SUFFIX))
    return {"parameters": elements, "bytes": total_bytes(entries.values())}


def _print_json(plans: list[dict], explanations: list[dict]) -> None:
    for plan, explanation in zip(plans, explanations, strict=False):
        plan["explain"] = explanation
    print(json.dumps(plans[0] if len(plans) == 1 else {"plans": plans}, indent=2))


def _print_tables(plans: list[dict], explanations: list[dict]) -> None:
    from benthic.plan.tables import print_comparison, print_explanation, print_plan

    if len(plans) > 1:
        print_comparison(plans)
    else:
        print_plan(plans[0])
    for plan, explanation in zip(plans, explanations, strict=False):
        print_explanation(plan["model"], explanation)


def _replay(as_json: bool) -> None:
    from benthic.plan.replay import replay
    from benthic.plan.training_plan import describe_replay

    found = describe_replay(replay())
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from benthic.plan.tables import print_replay

    print_replay(found)


def _expert_load(model: str, as_json: bool) -> None:
    loads = plan_expert_load(ModelConfig.from_pretrained(model))
    if as_json:
        print(json.dumps({"model": model, "expert_load": loads}, indent=2))
        return
    from benthic.plan.tables import print_expert_load

    print_expert_load(model, loads)


def _list(as_json: bool) -> None:
    if as_json:
        print(json.dumps({"presets": preset_names(), "devices": sorted(DEVICES)}, indent=2))
        return
    print("presets:")
    for name in preset_names():
        print(f"  {name}")
    print("devices:")
    for name, device in sorted(DEVICES.items()):
        print(f"  {name:<8}{device.title}")

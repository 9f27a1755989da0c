"""`benthic train`: a recipe's name or a config.yaml, settings by their dotted names, a run folder."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from benthic.cli.threads import choose_waiting
from benthic.config.override import override
from benthic.config.parallel import ParallelConfig
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, PeerError, RunError, did_you_mean
from benthic.log import logger

FLAGS = (
    "--run-folder", "--resume", "--plan-only", "--plan-device", "--simulate-world", "--show-config", "--help", "-h",
)  # fmt: skip
VALUED = ("--run-folder", "--plan-device", "--simulate-world")

EPILOG = """\
Every setting is an option by its dotted name, `--show-config` lists them with their values:

  benthic train demo --steps 500 --optimizer.learning_rate 3e-3 --data.source folder --data.path ~/text
  benthic train runs/demo/config.yaml --run-folder runs/again
  benthic train --resume --run-folder runs/demo
  torchrun --nproc-per-node 2 -m benthic train demo --parallel.expert 2
"""


def main(arguments: list[str]) -> int:
    """Train, or say what would be trained; 128 + the signal's number when a signal stopped the run.

    Of several ranks the first speaks: the others are given the same arguments and come to the same answers.
    """
    if os.environ.get("RANK", "0") == "0":
        return _main(arguments)
    logger.setLevel(logging.WARNING)
    try:
        return _main(arguments)
    except ConfigError as error:
        return error.exit_code


def _main(arguments: list[str]) -> int:
    own, settings = split_settings(arguments)
    options = _parser().parse_args(own)
    folder, resume = options.run_folder, options.resume
    base = _base(options.recipe, folder, resume)
    processes = options.simulate_world or int(os.environ.get("WORLD_SIZE", "1"))
    settings = over_all_processes(base.parallel, settings, processes)
    config = override(base, with_states_alone_split(base.parallel, settings))
    if options.show_config:
        print(config.to_yaml(), end="")
        return 0
    if options.plan_only:
        print_plan(config, options.plan_device)
        return 0
    if options.simulate_world:
        from benthic.train.simulation import simulate

        for line in simulate(config):
            print(line)
        return 0
    choose_waiting()
    from benthic.train.run import run

    folder = folder or Path("runs") / config.name
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and (folder / "config.yaml").is_file():
        logger.info("torchrun started this run again: it goes on from the last saved state")
        resume = True
    try:
        summary = run(config, folder, resume)
    except PeerError as error:
        return error.exit_code
    if summary.interrupted:
        return 128 + summary.interrupted
    if os.environ.get("RANK", "0") == "0":
        print(summary.model)
    return 0


def over_all_processes(parallel: ParallelConfig, settings: Mapping[str, str], processes: int) -> dict[str, str]:
    """`settings`, where they do not say what `shard` is, with all processes of torchrun that no other axis takes."""
    named = any(name.startswith("parallel.") for name in settings)
    if processes == 1 or "parallel.shard" in settings or (parallel.world == processes and not named):
        return dict(settings)
    taken = 1
    for axis in ("replicate", "pipeline", "tensor", "context"):
        given = str(settings.get(f"parallel.{axis}", getattr(parallel, axis)))
        taken *= int(given) if given.isdecimal() else 1
    return {**settings, "parallel.shard": str(max(1, processes // max(1, taken)))}


def with_states_alone_split(parallel: ParallelConfig, settings: Mapping[str, str]) -> dict[str, str]:
    """`settings`, where they do not say what `zero` is, with 1 for a pipeline: the most that its ranks can split."""
    pipeline = str(settings.get("parallel.pipeline", parallel.pipeline))
    if pipeline == "1" or "parallel.zero" in settings or parallel.zero <= 1:
        return dict(settings)
    return {**settings, "parallel.zero": "1"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benthic train",
        description="Train a model from random weights, or continue a run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or path of a config.yaml")
    parser.add_argument("--run-folder", type=Path, help="where the run is kept (runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--plan-only", action="store_true", help="print what the run takes, train nothing")
    parser.add_argument("--plan-device", default="cpu", help="where --plan-only plans it: cpu, h100, h200 ... (cpu)")
    parser.add_argument(
        "--simulate-world", type=int, metavar="N", help="check the layout of N ranks in this process, train nothing"
    )
    parser.add_argument("--show-config", action="store_true", help="print the whole config as YAML, train nothing")
    return parser


def split_settings(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command's own arguments, and the settings: `--a.b value` or `--a.b=value`."""
    own: list[str] = []
    settings: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in FLAGS:
            own.append(argument)
            if name in VALUED and not equals:
                own += [one for one in [next(rest, None)] if one is not None]
        elif name.startswith("--"):
            path = name.removeprefix("--")
            if path.partition(".")[0].replace("-", "_") not in TrainConfig.model_fields:
                flags = [flag.removeprefix("--") for flag in FLAGS if flag.startswith("--")]
                hint = did_you_mean(path.partition(".")[0], [*TrainConfig.model_fields, *flags])
                raise ConfigError(f"unknown option {name}", hint=hint)
            given = value if equals else next(rest, None)
            if given is None:
                raise ConfigError(f"option {name} needs a value")
            settings[path.replace("-", "_")] = given
        else:
            own.append(argument)
    return own, settings


def _base(recipe: str | None, folder: Path | None, resume: bool) -> TrainConfig:
    if recipe is None:
        if not resume or folder is None:
            raise ConfigError(
                "which recipe? none was named", hint="benthic train demo, or --resume --run-folder FOLDER to continue"
            )
        if not (folder / "config.yaml").is_file():
            raise RunError(
                f"nothing to resume in {folder}: it has no config.yaml",
                hint="--run-folder names the folder of a run; start one with benthic train RECIPE --run-folder FOLDER",
            )
        return TrainConfig.from_yaml(folder / "config.yaml")
    if Path(recipe).is_file():
        return TrainConfig.from_yaml(recipe)
    if (Path(recipe) / "config.yaml").is_file():
        raise ConfigError(
            f"{recipe!r} is the folder of a run",
            hint=f"continue it with --resume --run-folder {recipe}, or start from its settings: {recipe}/config.yaml",
        )
    from benthic.recipes import find_recipe

    return find_recipe(recipe)()


def print_plan(config: TrainConfig, device: str) -> None:
    """Size, memory, time of a run on a device of the planner, from the config alone."""
    from benthic.plan.devices import find_device
    from benthic.train.fit import plan_run

    plan = plan_run(config, find_device(device))
    count, step, memory = plan.parameters, plan.step, plan.memory
    rows = {
        "run": config.name,
        "parameters": f"{count.total:,}, {count.active:,} active for a token; {count.mtp_unique:,} more predict ahead",
        "updates": f"{config.steps:,}, {plan.tokens:,} tokens",
        "FLOPs": f"{step.flops / step.tokens:.3e} a token, {step.flops / step.tokens * plan.tokens:.3e} in all",
        "device": plan.device.title
        if config.parallel.world == 1
        else f"{config.parallel.world:,} x {plan.device.title}",
        **({} if config.parallel.world == 1 else {"layout": f"{config.parallel}; memory is the fullest rank's"}),
        "memory": f"{memory.total / 2**30:.2f} GiB at {memory.moment}, of {plan.device.memory_bytes / 2**30:.0f} GiB"
        + ("" if plan.fits else ": DOES NOT FIT"),
        **{f"  {part}": f"{size / 2**30:.3f} GiB" for part, size in memory.by_part.items()},
        "time": f"{step.total:.3f} s an update, {step.tokens / step.total:,.0f} tokens/s, {plan.hours:,.2f} hours",
        **{f"  {part}": f"{seconds:.4f} s" for part, seconds in step.by_part.items() if seconds},
    }
    for name, text in rows.items():
        print(f"{name:<24}{text}")
    print("assumed: " + "; ".join(step.assumptions))

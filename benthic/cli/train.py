"""`benthic train`: a recipe's name or a config.yaml, settings by their dotted names, a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from benthic.config.override import override
from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, did_you_mean

FLAGS = ("--run-folder", "--resume", "--plan-only", "--show-config", "--help", "-h")

EPILOG = """\
Every setting is an option by its dotted name, `--show-config` lists them with their values:

  benthic train demo --steps 500 --optimizer.learning_rate 3e-3 --data.source folder --data.path ~/text
  benthic train runs/demo/config.yaml --run-folder runs/again
  benthic train --resume --run-folder runs/demo
"""


def main(arguments: list[str]) -> int:
    """Train, or say what would be trained; 128 + the signal's number when a signal stopped the run."""
    own, settings = split_settings(arguments)
    options = _parser().parse_args(own)
    config = override(_base(options.recipe, options.run_folder, options.resume), settings)
    if options.show_config:
        print(config.to_yaml(), end="")
        return 0
    if options.plan_only:
        print(outline(config))
        return 0
    from benthic.train.run import run

    folder = options.run_folder or Path("runs") / config.name
    summary = run(config, folder, options.resume)
    if summary.interrupted:
        return 128 + summary.interrupted
    print(summary.model)
    return 0


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
    parser.add_argument("--plan-only", action="store_true", help="print size and cost of the run, train nothing")
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
            if name == "--run-folder" and not equals:
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
        return TrainConfig.from_yaml(folder / "config.yaml")
    if Path(recipe).is_file():
        return TrainConfig.from_yaml(recipe)
    from benthic.recipes import find_recipe

    return find_recipe(recipe)()


def outline(config: TrainConfig) -> str:
    """Size and cost of a run in a few lines, from the config alone."""
    from benthic.plan.flops import training_flops_per_token
    from benthic.plan.parameters import count_parameters
    from benthic.train.schedule import planned_tokens

    model, length = config.model, config.data.sequence_length
    count, tokens = count_parameters(model), planned_tokens(config)
    flops = training_flops_per_token(model, length, include_mtp=True)
    # float32 masters, gradients and two moments; bfloat16 weights come on top where matrices are multiplied in them.
    state_bytes = (count.total + count.mtp_unique) * (16 + (2 if config.precision.compute == "bfloat16" else 0))
    rows = {
        "run": config.name,
        "parameters": f"{count.total:,}, {count.active:,} active for a token; {count.mtp_unique:,} more predict ahead",
        "updates": f"{config.steps:,}",
        "tokens": f"{tokens:,}",
        "FLOPs a token": f"{flops:.3e}",
        "FLOPs": f"{flops * tokens:.3e}",
        "weights, gradients, moments": f"{state_bytes / 2**30:.3f} GiB",
    }
    return "\n".join(f"{name:<28}{value}" for name, value in rows.items())

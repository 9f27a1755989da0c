"""`benthic bench NAME`: a measurement beside its peer, in the same run. The code lies in the checkout's benchmarks/."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from benthic.errors import ConfigError
from benthic.files import write_atomic

CHECKOUT = Path(__file__).parents[2]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="benthic bench train --help lists what is allowed")


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of a workload are named as in benchmarks.train.Workload."""
    parser = _Parser(prog="benthic bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=["train"], help="train: a training step and cached greedy decoding")
    parser.add_argument("--preset", help="preset name, folder with config.json, or such a file (default tiny)")
    for name, what in (
        ("batch", "sequences of a training step"),
        ("sequence-length", "tokens of one"),
        ("prompt-tokens", "before decoding"),
        ("new-tokens", "decoded"),
        ("repetitions", "how often each side is timed"),
        ("threads", "of the processor"),
        ("seed", "of weights and tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights (default float32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default cpu)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(arguments: list[str]) -> int:
    """Check, measure, print; keep the result where asked."""
    options = make_parser().parse_args(arguments)
    train = _benchmark(options.name)
    fields = train.Workload.model_fields
    given = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    result = train.measure(train.Workload(**given))
    text = json.dumps(result, indent=2) + "\n"
    if options.output is not None:
        write_atomic(options.output, text)
    print(text if options.json else table(result), end="")
    return 0


def _benchmark(name: str) -> Any:
    """The module of a benchmark, from the checkout that benthic runs from."""
    if not (CHECKOUT / "benchmarks" / f"{name}.py").is_file():
        raise ConfigError(
            f"there is no benchmarks/{name}.py beside the benthic package in {CHECKOUT}",
            hint="benchmarks come with the source: clone it and install it with pip install --editable .",
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return import_module(f"benchmarks.{name}")


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    workload, machine = result["workload"], result["machine"]
    lines = [
        f"{workload['preset']}: {result['model']['parameters'] / 1e6:.1f}M parameters, {workload['dtype']}, "
        f"{workload['device']}, {workload['threads']} threads; {machine['processor']}, {machine['cores']} cores",
        "logits, loss and greedy tokens agree with transformers",
    ]
    for part, title in (
        ("training", f"training step, {workload['batch']} x {workload['sequence_length']} tokens"),
        ("decoding", f"greedy decoding, {workload['new_tokens']} tokens, batch 1"),
    ):
        lines += ["", f"{title:<44}{'tokens/s':>10}   quartiles"]
        for name, speed in result[part]["speed"].items():
            spread = f"{speed['first_quartile']:.0f} to {speed['third_quartile']:.0f}"
            lines.append(f"  {name:<42}{speed['median']:>10.0f}   {spread}")
        found = result[part]["times_transformers"]
        spread = f"{found['first_quartile']:.2f} to {found['third_quartile']:.2f}"
        lines.append(f"  {'times transformers':<42}{found['median']:>10.2f}   {spread}")
    return "\n".join(lines) + "\n"

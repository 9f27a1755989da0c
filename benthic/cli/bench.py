"""`benthic bench NAME`: a measurement beside its peer, in the same run. The code lies in the checkout's benchmarks/."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from benthic.cli.api_key import add_key_options, read_key
from benthic.errors import ConfigError
from benthic.files import write_atomic

CHECKOUT = Path(__file__).parents[2]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"{self.prog} --help lists what is allowed")


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of a workload are named as in benchmarks.train.Workload."""
    parser = _Parser(prog="benthic bench", description=__doc__, allow_abbrev=False)
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    kernels = benchmarks.add_parser("kernels", allow_abbrev=False, help="every kernel beside its peers; needs a GPU")
    kernels.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="cases or topics named so in part")
    kernels.add_argument("--without", nargs="+", default=(), metavar="TEXT", help="peers named so in part are left out")
    kernels.add_argument("--topic-seconds", type=float, help="a topic that takes longer is stopped (default 240)")
    kernels.add_argument("--rounds", type=int, help="of five samples each (default 3)")
    train = benchmarks.add_parser(
        "train",
        allow_abbrev=False,
        help="training; on a GPU full updates of the benchmark's models, on a CPU a small one beside transformers",
        description="With --preset or --device: a training step and cached greedy decoding beside transformers on the "
        "same weights (tiny on the CPU by default). Otherwise, where torch finds a GPU: full updates of the "
        "benchmark's models, arm by arm.",
    )
    train.add_argument("--preset", help="preset name, folder with config.json, or such a file (default tiny)")
    for name, what in (
        ("batch", "sequences of a training step"),
        ("sequence-length", "tokens of one"),
        ("prompt-tokens", "before decoding"),
        ("new-tokens", "decoded"),
        ("repetitions", "how often each side is timed"),
        ("threads", "of the processor"),
        ("seed", "of weights and tokens"),
    ):
        train.add_argument(f"--{name}", type=int, help=what)
    train.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights (default float32)")
    train.add_argument("--device", help="cpu, cuda, cuda:1 ... (default cpu)")
    gpu = train.add_argument_group("on a GPU")
    gpu.add_argument("--arms", nargs="+", metavar="ARM", help="ways to train, from benchmarks/train_arms.py")
    gpu.add_argument("--steps", type=int, help="timed updates an arm, at least 15 (default 20)")
    gpu.add_argument("--arm-seconds", type=float, help="an arm that takes longer is stopped (default 280)")
    gpu.add_argument("--profile", action="store_true", help="time by operation of one more step, beside the result")
    gpu.add_argument("--add", action="store_true", help="keep what --output holds of arms not measured now")
    decode = benchmarks.add_parser("decode", allow_abbrev=False, help="the engine: prompts and decoding by batch size")
    decode.add_argument(
        "--model", help="preset name or folder (default tiny); a folder without weights gets random ones"
    )
    decode.add_argument("--batches", nargs="+", type=int, metavar="B", help="sequences at once (default 1 8)")
    decode.add_argument("--prompt-tokens", type=int, help="of each sequence (default 512)")
    decode.add_argument("--new-tokens", type=int, help="decoded behind them (default 256)")
    decode.add_argument("--repetitions", type=int, help="how often each size is timed (default 3)")
    decode.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights (default bfloat16)")
    decode.add_argument("--device", help="cpu, cuda, cuda:1 ... (default cpu)")
    decode.add_argument("--draft-tokens", type=int, help="drafts a step (default 0: none)")
    decode.add_argument(
        "--acceptance", type=float, help="pretend that this share of drafts is right: random weights' are not"
    )
    serve = benchmarks.add_parser(
        "serve", allow_abbrev=False, help="a server under load, timed as vllm bench serve does it"
    )
    _add_serve_options(serve)
    for one in (kernels, train, decode, serve):
        one.add_argument("--output", type=Path, metavar="FILE", help="keep the result as JSON")
        one.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--url", required=True, help="an OpenAI-compatible server, such as http://127.0.0.1:8000")
    serve.add_argument("--model", required=True, help="its folder, its preset's name, or the server's name for it")
    for name, what in (
        ("vocabulary", "token ids of prompts are below this (default: the model's)"),
        ("requests", "how many (default 100)"),
        ("concurrency", "at most so many on their way at once (default: no bound)"),
        ("prompt-tokens", "of each (default 512)"),
        ("new-tokens", "of each answer (default 128)"),
        ("warm-up", "requests before those measured (default 1)"),
        ("seed", "of prompts and arrivals (default 0)"),
    ):
        serve.add_argument(f"--{name}", type=int, help=what)
    serve.add_argument("--rate", type=float, help="requests a second, Poisson (default: all at once)")
    serve.add_argument("--temperature", type=float, help="default 0")
    serve.add_argument("--request-seconds", type=float, help="an answer that takes longer failed (default 600)")
    serve.add_argument(
        "--goodput", nargs="+", type=_bound, metavar="NAME:MS", help="count requests that keep ttft, tpot, e2el bounds"
    )
    add_key_options(serve)


def _bound(text: str) -> tuple[str, float]:
    name, _, milliseconds = text.partition(":")
    return name, float(milliseconds)


def main(arguments: list[str]) -> int:
    """Check, measure, print; keep the result where asked. 1 where a part of the benchmark failed."""
    options = make_parser().parse_args(arguments)
    benchmark = _benchmark(_module(options))
    result = RUNS[benchmark.__name__.split(".")[-1]](benchmark, options)
    print(json.dumps(result, indent=2) if options.json else benchmark.table(result), end="\n" if options.json else "")
    broken = benchmark.failures(result)
    for one in broken:
        print(f"failed: {one}", file=sys.stderr)
    return 1 if broken else 0


def _module(options: argparse.Namespace) -> str:
    if options.name != "train":
        return options.name
    compared = [name for name in ("preset", "device") if getattr(options, name) is not None]
    on_gpu = [name for name in ("arms", "steps", "arm_seconds") if getattr(options, name) is not None]
    on_gpu += [name for name in ("profile", "add") if getattr(options, name)]
    if compared and on_gpu:
        raise ConfigError(f"--{on_gpu[0].replace('_', '-')} and --{compared[0]} belong to different measurements")
    if compared or not (on_gpu or _finds_gpu()):
        return "train"
    return "train_gpu"


def _finds_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _kernels(benchmark: Any, options: argparse.Namespace) -> dict[str, Any]:
    result = benchmark.measure(benchmark.Options(**_given(benchmark.Options, options)))
    _keep(result, options.output)
    return result


def _decode(benchmark: Any, options: argparse.Namespace) -> dict[str, Any]:
    result = benchmark.measure(benchmark.Workload(**_given(benchmark.Workload, options)))
    _keep(result, options.output)
    return result


def _train(benchmark: Any, options: argparse.Namespace) -> dict[str, Any]:
    result = benchmark.measure(benchmark.Workload(**_given(benchmark.Workload, options)))
    _keep(result, options.output)
    return result


def _train_gpu(benchmark: Any, options: argparse.Namespace) -> dict[str, Any]:
    if options.add and options.output is None:
        raise ConfigError("--add keeps what --output holds, and there is no --output")
    return benchmark.measure(benchmark.Options(**_given(benchmark.Options, options)), options.output, options.add)


def _serve(benchmark: Any, options: argparse.Namespace) -> dict[str, Any]:
    given = _given(benchmark.Workload, options)
    workload = benchmark.Workload(**(given | {"goodput": dict(given.get("goodput", ()))}))
    result = benchmark.measure(workload, read_key(options))
    _keep(result, options.output)
    return result


RUNS = {"decode": _decode, "kernels": _kernels, "serve": _serve, "train": _train, "train_gpu": _train_gpu}


def _given(settings: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the user gave of the fields of `settings`."""
    return {name: value for name, value in vars(options).items() if name in settings.model_fields and value is not None}


def _keep(result: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        write_atomic(output, json.dumps(result, indent=2) + "\n")


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

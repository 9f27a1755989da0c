"""`benthic demo`: plan, train, measure, sample and export a DeepSeek-V3 in miniature, on this machine, without network.

The text is this Python's own standard library, read in place. A run that was interrupted goes on where it stopped; one
that is finished is set aside under another name, so nothing is lost, and its prepared text is used again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benthic.cli.threads import choose_waiting
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from benthic.config.data import DataConfig
    from benthic.config.train import TrainConfig
    from benthic.data import Compression

PROMPT = "def __init__(self, "


def main(arguments: list[str]) -> int:
    """Run the demo; 128 + the signal's number when a signal stopped it, after the state was saved."""
    options = _parser().parse_args(arguments)
    from rich.console import Console

    from benthic.recipes.demo import demo

    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; at least 1 is needed")
    config = demo()
    if options.steps != config.steps or options.source != config.data.source:
        config = config.replace(steps=options.steps, data=config.data.replace(source=options.source))
    choose_waiting()
    console = Console(highlight=False)
    began = time.monotonic()
    _show_plan(console, config)
    interrupted = _train(config, options.run_folder)
    if interrupted:
        return 128 + interrupted
    _show_results(console, config, options.run_folder)
    _show_completion(console, options.run_folder / "model")
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"\n{minutes} min {seconds} s in all. The model is in {options.run_folder / 'model'}. Next:")
    console.print(f"  benthic generate {options.run_folder / 'model'} --prompt 'import '", soft_wrap=True)
    console.print(f"  benthic inspect {options.run_folder / 'model'}", soft_wrap=True)
    console.print("  benthic plan deepseek-v3", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    from benthic.recipes.demo import demo

    parser = argparse.ArgumentParser(prog="benthic demo", description=__doc__)
    parser.add_argument("--run-folder", type=Path, default=Path("runs/demo"), help="where the run is kept (runs/demo)")
    parser.add_argument("--steps", type=int, default=demo().steps, help="updates to train (%(default)s)")
    parser.add_argument(
        "--source",
        choices=("stdlib", "procedural"),
        default="stdlib",
        help="text to learn from: the standard library of this Python, or text that benthic writes itself",
    )
    return parser


def _show_plan(console: Console, config: TrainConfig) -> None:
    from benthic.plan.flops import training_flops_per_token
    from benthic.plan.kv_cache import bytes_per_token_if
    from benthic.plan.parameters import count_parameters
    from benthic.train.schedule import planned_tokens

    model, length = config.model, config.data.sequence_length
    count, tokens = count_parameters(model), planned_tokens(config)
    flops = training_flops_per_token(model, length, include_mtp=True)
    cache = bytes_per_token_if(model)
    console.print(f"[bold]The plan[/]: a DeepSeek-V3 with every part, {count.total / 671e9:.1e} of its size")
    rows = {
        "parameters": f"{count.total:,}, {count.active:,} active for a token; {count.mtp_unique:,} more predict ahead",
        "layers": f"{model.num_hidden_layers}, {model.num_expert_layers} of them with {model.n_routed_experts} experts "
        f"({model.num_experts_per_tok} chosen, {model.n_shared_experts} shared)",
        "attention": f"latent: {cache['mla']:,} bytes of cache a token instead of {cache['mha']:,} (bf16)",
        "training": f"{config.steps:,} updates, {tokens:,} tokens, {flops * tokens:.2e} FLOPs",
    }
    for name, text in rows.items():
        console.print(f"  {name:<12}{text}", soft_wrap=True)


def _train(config: TrainConfig, folder: Path) -> int | None:
    """The signal that stopped the run, or None at its end."""
    from benthic.train.run import run

    # Only a finished run is moved; any other folder with things in it is refused by run().
    if all((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "model")):
        _set_aside(folder)
    resume = (folder / "config.yaml").exists()
    summary = run(config, folder, resume)
    return summary.interrupted


def _set_aside(folder: Path) -> None:
    """Rename a finished run, and give its prepared text to the next."""
    from benthic.log import logger

    number = 1
    while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(kept)
    folder.mkdir()
    if (kept / "data").exists():
        (kept / "data").rename(folder / "data")
    logger.info("the earlier run is now in %s", kept)


def _show_results(console: Console, config: TrainConfig, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "val_loss" in row]
    first, last, final = updates[0], updates[-1], checks[-1]
    compressed = _compressors(config.data)
    console.print("\n[bold]What came of it[/]")
    console.print(f"  loss          {first['loss']:.2f} at the first update, {last['loss']:.2f} at the last")
    console.print(
        f"  held out      {final['bits_per_byte']:.2f} bits a byte; on the same {compressed.held_out_bytes:,} bytes "
        f"zlib takes {compressed.zlib_alone:.2f}, xz {compressed.xz_alone:.2f}, "
        f"xz that has read the training text {compressed.xz_after_training_text:.2f}",
        soft_wrap=True,
    )
    worst, even = max(updates, key=lambda row: row["max_violation"]), final["max_violation_global"]
    console.print(
        f"  expert load   MaxVio {worst['max_violation']:.2f} at its worst (update {worst['step']}), "
        f"{last['max_violation']:.2f} in the last batch, {even:.2f} over the held-out text; "
        f"{last['dead_experts']} experts without a token in the last batch",
        soft_wrap=True,
    )
    accepted = ", ".join(f"{row['mtp_acceptance'][0]:.0%}" for row in checks)
    console.print(f"  MTP           drafts accepted on held-out text, check by check: {accepted}", soft_wrap=True)


def _compressors(config: DataConfig) -> Compression:
    from benthic.data import compress
    from benthic.data.sources import open_source
    from benthic.data.splits import split

    texts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for which, document in split(open_source(config).read, config.validation_fraction):
        texts[which].append(document.text.encode())
    return compress(b"".join(texts["validation"]), b"".join(texts["train"]))


def _show_completion(console: Console, model_folder: Path) -> None:
    import torch

    from benthic.inference.generate import generate_text
    from benthic.inference.pretrained import load_model
    from benthic.model.sampling import SamplingParams
    from benthic.text import Tokenizer

    model = load_model(model_folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(model_folder)
    params = SamplingParams(max_tokens=96, temperature=0.5, seed=0)
    pieces = generate_text(model, tokenizer, PROMPT, params)
    console.print("\n[bold]A completion[/] by the exported model, read back from disk (temperature 0.5, seed 0):")
    console.print(PROMPT + "".join(pieces), markup=False)

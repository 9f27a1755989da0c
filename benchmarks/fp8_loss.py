"""Training in FP8 beside bfloat16: same model, text, order and seed, and how far the losses come apart.

    python -m benchmarks.fp8_loss --out FOLDER [--arms bfloat16 again float8 blocks] [--steps 1100] [--text FOLDER]
    python -m benchmarks.fp8_loss --out FOLDER --arms --plot docs/fp8-loss.svg

The model has DeepSeek-V3's parts (latent attention with compressed queries, 1 shared and 64 routed experts, sigmoid
router whose bias evens the load) and 0.55 B parameters; the text is this Python's standard library or, larger, any
folder of text. Losses are smoothed as the paper smooths its own (arXiv:2412.19437, section B.1: an exponential average
of 0.9), and the difference is relative to bfloat16. `blocks` is the paper's warning (section B.2): FP8 whose gradients
are quantised by 128 x 128 instead of 1 x 128; it exists here alone. `again` is bfloat16 with one first weight moved by
one bit: how far two runs come apart by chance.

FOLDER/ARM.json is written every 50 updates. A run that was stopped keeps finished arms and starts the others anew.
FOLDER/fp8_loss.json gathers all arms at the end. Processes may train one arm each, side by side, in one FOLDER once its
text is prepared (`--arms` without a name prepares it, trains nothing and gathers what is there).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig
from benthic.config.train import BatchConfig, OptimizerConfig, Phase, PrecisionConfig, Schedule, TrainConfig
from benthic.data import Loader, prepare
from benthic.data.tokens import TokenFile
from benthic.files import write_atomic
from benthic.log import logger, to_stderr
from benthic.model.float8 import use_float8
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.numerics.reference.swiglu_fp8 import swiglu_gradient
from benthic.ops import float8
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place
from benthic.train.step import finish, launch

SMOOTHING, BOUND = 0.9, 0.25
"""Of the exponential average; percent, what the paper found and this must stay below."""
ARMS = ("bfloat16", "again", "float8", "blocks")
EVERY = 50


SIZES: dict[str, dict[str, int]] = {
    "half-billion": {
        "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 256,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "moe_intermediate_size": 640,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
}  # fmt: skip
"""half-billion: 553 M parameters, 97 M of them active for a token; wide rather than deep, so that the GPU does not wait
for the host. tiny is for tests."""


def model_config(size: str) -> ModelConfig:
    """V3's router and layout in one of SIZES."""
    return ModelConfig(
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        initializer_range=0.02,
        **SIZES[size],
    )


def train_config(options: argparse.Namespace, compute: str) -> TrainConfig:
    """The run of an arm; nothing but `compute` differs."""
    model = model_config(options.size)
    warm_up = Phase(shape="linear", until=min(100, options.steps / 2), unit="steps")
    decay = Phase(shape="cosine", until=options.steps, unit="steps", factor=0.03)
    return TrainConfig(
        name="fp8-loss",
        model=model,
        data=DataConfig(
            source=options.text if options.text in ("stdlib", "procedural") else "folder",
            path=None if options.text in ("stdlib", "procedural") else options.text,
            procedural_bytes=200_000,
            vocab_size=model.vocab_size,
            sequence_length=options.length,
            tokenizer_training_bytes=20_000_000,
        ),
        steps=options.steps,
        optimizer=OptimizerConfig(learning_rate=Schedule(peak=8e-4, start=0.0, phases=(warm_up, decay))),
        batch=BatchConfig(sequences=Schedule(peak=options.batch), micro_sequences=options.batch),
        precision=PrecisionConfig(compute=compute),
    )


def main() -> int:
    options = _options()
    to_stderr()
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    data = prepare(train_config(options, "bfloat16").data, options.out / "data").train
    for arm in options.arms:
        file = options.out / f"{arm}.json"
        if file.exists() and json.loads(file.read_text())["finished"]:
            logger.info("%s is there already", arm)
            continue
        steps = options.steps if arm != "blocks" else min(options.steps, options.block_steps)
        for losses, seconds in _train(arm, data, options, device, steps):
            result = {"losses": losses, "seconds": seconds, "finished": len(losses) == steps}
            write_atomic(file, json.dumps(result | _origin(options, device)))
            logger.info("%s: update %d, loss %.3f, %.0f s", arm, len(losses), losses[-1], seconds)
            if time.monotonic() - began > options.seconds:
                logger.warning("%.0f s are over: %s stops after %d updates", options.seconds, arm, len(losses))
                break
    document = gather(options.out)
    write_atomic(options.out / "fp8_loss.json", json.dumps(document))
    logger.info("%s", json.dumps(document["summary"]))
    if options.plot:
        plot(document, options.plot)
    return 0


def gather(folder: Path) -> dict[str, Any]:
    """What the arms in `folder` wrote, and how far they are apart."""
    files = {arm: folder / f"{arm}.json" for arm in ARMS}
    arms = {arm: json.loads(file.read_text()) for arm, file in files.items() if file.exists()}
    return {"name": "fp8_loss", "summary": summary(arms), "arms": arms}


def _origin(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Where and on what an arm was trained."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {
        "machine": describe(("torch", "triton")),
        "command": "python -m benchmarks.fp8_loss " + " ".join(sys.argv[1:]),
        "text": options.text if options.text in ("stdlib", "procedural") else Path(options.text).name,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw what FOLDER holds in the end")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--block-steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=540, help="no arm goes on after so many")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--size", default="half-billion", choices=tuple(SIZES))
    parser.add_argument("--text", default="stdlib", help="stdlib, procedural, or a folder of .py, .md, .txt and .rst")
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"--arms knows {', '.join(ARMS)}, not {', '.join(sorted(unknown))}")
    return options


def _train(
    arm: str, data: TokenFile, options: argparse.Namespace, device: str, steps: int
) -> Iterator[tuple[list[float], float]]:
    """Losses of all updates so far and the seconds they took, every EVERY updates and at the end."""
    compute = "bfloat16" if arm in ("bfloat16", "again") else "float8"
    config = train_config(options, compute)
    loader = Loader(data, config.data.sequence_length, config.data.seed)
    torch.manual_seed(0)
    model = LanguageModel(config.model, device, torch.bfloat16)
    initialise(model, config.seed)
    if arm == "again":
        model.model.norm.weight.detach().view(torch.int16)[0] += 1
    if compute == "float8":
        use_float8(model)
    optimizer = Optimizer(model, config.optimizer)
    losses: list[float] = []
    with gradients_by_blocks(device) if arm == "blocks" else nullcontext():
        began = time.monotonic()
        launched = None
        for step in range(1, steps + 2):
            before = launched
            if step <= steps:  # launched before the last one is waited for
                place = Place(step, (step - 1) * options.batch * options.length, config.steps)
                launched = launch(model, optimizer, loader.next_batch(options.batch), place, config, before)
            if before is not None:
                losses.append(finish(before, options.out / "failures").loss)
                if len(losses) % EVERY == 0 or len(losses) == steps:
                    yield losses, time.monotonic() - began


@contextmanager
def gradients_by_blocks(device: str) -> Iterator[None]:
    """FP8 products whose gradients have a scale for 128 x 128 elements, everything else as it was."""
    usual = float8.arithmetic
    tiles = usual(device)
    if device == "cuda":
        from benthic.kernels.quantise import quantise_weights
    else:
        from benthic.numerics.reference.quantise import quantise_weights

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = quantise_weights(x[None], power_of_two=True)
        return values[0], scales[0].repeat_interleave(128, 0)[: len(x)].T.contiguous()

    def swiglu(gradient: Tensor, kept: Tensor, kept_scales: Tensor, weights: Tensor | None):
        hidden, active, of_weights = swiglu_gradient(gradient, kept, kept_scales, weights)
        return *rows(hidden.bfloat16()), *tiles.rows(active.bfloat16()), of_weights

    blocks = tiles._replace(gradient_rows=rows, swiglu_gradient=swiglu)
    float8.arithmetic = lambda device_type: blocks
    try:
        yield
    finally:
        float8.arithmetic = usual


def smoothed(losses: list[float]) -> list[float]:
    """The exponential average of 0.9 after each update."""
    return list(accumulate(losses, lambda before, loss: SMOOTHING * before + (1 - SMOOTHING) * loss))


def differences(arms: dict[str, Any], arm: str) -> list[float]:
    """Of the smoothed losses of `arm`, relative to bfloat16's, in percent, while both last."""
    both = zip(smoothed(arms[arm]["losses"]), smoothed(arms["bfloat16"]["losses"]), strict=False)
    return [100 * (loss - plain) / plain for loss, plain in both]


def summary(arms: dict[str, Any]) -> dict[str, Any]:
    """How far each arm is from bfloat16 over the last tenth of the updates both made, and at most after the first."""
    found: dict[str, Any] = {}
    for arm in arms:
        found[arm] = {
            "updates": len(arms[arm]["losses"]),
            "last_smoothed_loss": smoothed(arms[arm]["losses"])[-1],
        }
        if arm != "bfloat16" and "bfloat16" in arms:
            apart = differences(arms, arm)
            tail, rest = apart[-max(1, len(apart) // 10) :], apart[len(apart) // 10 :]
            found[arm] |= {
                "mean_difference_of_last_tenth_percent": sum(tail) / len(tail),
                "largest_difference_after_first_tenth_percent": max(map(abs, rest)),
                "within_bound": abs(sum(tail) / len(tail)) < BOUND,
            }
    return found


def plot(document: dict[str, Any], to: Path) -> None:
    """Smoothed losses above, relative differences below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = document["arms"]
    text = " and ".join(sorted({arm["text"] for arm in arms.values()}))
    names = {
        "bfloat16": "bfloat16",
        "again": "bfloat16, one bit of one first weight changed",
        "float8": "FP8, gradients 1 x 128",
        "blocks": "FP8, gradients 128 x 128",
    }
    colours = {"bfloat16": "black", "again": "0.6", "float8": "tab:blue", "blocks": "tab:red"}
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="tight")
    for arm in arms:
        above.plot(smoothed(arms[arm]["losses"]), color=colours[arm], label=names[arm], linewidth=1)
        if arm != "bfloat16":
            below.plot(differences(arms, arm), color=colours[arm], linewidth=1)
    above.set(ylabel="loss, nats a token", title=f"553 M parameters, text: {text}", yscale="log")
    above.legend(frameon=False)
    below.axhspan(-BOUND, BOUND, color="0.9", zorder=0)
    below.axhline(0, color="black", linewidth=0.5)
    below.set(ylabel="difference, %", xlabel="update", ylim=(-1.5, 1.5))
    figure.savefig(to)


if __name__ == "__main__":
    sys.exit(main())

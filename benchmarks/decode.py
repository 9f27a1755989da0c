"""The engine by batch size: prompts, then decoding, as offline benchmarks of the field time it.

A size is timed twice, once for one new token and once for all: the difference is decoding, what the first takes is the
prompt. Prompts are random tokens and found nowhere in the cache. Graphs are captured before: where drafts make sizes a
matter of luck, by a whole run whose luck is that of the timed ones.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field

from benchmarks.machine import describe
from benthic.config import ModelConfig
from benthic.config.engine import CacheStorage, EngineConfig, WeightStorage
from benthic.config.settings import Settings
from benthic.inference.drawing import Drawn
from benthic.inference.engine import Engine, Flight
from benthic.inference.pretrained import load_model
from benthic.model import LanguageModel
from benthic.model.float8_storage import store_in_float8
from benthic.model.sampling import SamplingParams


class Workload(Settings):
    """What is timed, and on what."""

    model: str = "tiny"
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = Field(512, ge=1)
    new_tokens: int = Field(256, ge=2)
    repetitions: int = Field(3, ge=1)
    dtype: str = "bfloat16"
    device: str = "cpu"
    draft_tokens: int = Field(0, ge=0)
    acceptance: float | None = Field(None, ge=0, le=1)
    weights: WeightStorage = "plain"
    cache: CacheStorage = "plain"


class PretendingEngine(Engine):
    """Takes a share of drafts for right whatever the model says: the speed of speculation without a trained model."""

    def __init__(self, *arguments: Any, acceptance: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._acceptance = acceptance
        self.forget_luck()

    def forget_luck(self) -> None:
        """Let the next run meet the luck of the last one."""
        self._dice = random.Random(0)

    def _draw(self, flight: Flight) -> list[list[Drawn]]:
        drawn = super()._draw(flight)
        for (_, _, drafts), tokens in zip(flight.works, drawn, strict=True):
            for place, draft in enumerate(drafts):
                right = self._dice.random() < self._acceptance
                tokens[place] = tokens[place]._replace(token=draft if right else (draft + 1) % 1000 + 10)
        return drawn


def measure(workload: Workload) -> dict[str, Any]:
    """Milliseconds a step and tokens a second of every batch size."""
    begun = time.perf_counter()
    engine = _engine(workload)
    _wait(engine)
    startup = time.perf_counter() - begun
    dice, results = random.Random(0), []
    _seconds(engine, max(workload.batches), 4, workload, dice)
    for batch in workload.batches:
        _seconds(engine, batch, 4 if workload.acceptance is None else workload.new_tokens, workload, dice)
        prompts, wholes, steps = [], [], []
        for _ in range(workload.repetitions):
            prompts.append(_seconds(engine, batch, 1, workload, dice)[0])
            seconds, count = _seconds(engine, batch, workload.new_tokens, workload, dice)
            wholes.append(seconds)
            steps.append(count)
        prompt, whole = median(prompts), median(wholes)
        results.append(
            {
                "batch": batch,
                "prompt_tokens_per_second": batch * workload.prompt_tokens / prompt,
                "prompt_ms": prompt * 1e3,
                "ms_per_token": (whole - prompt) / (workload.new_tokens - 1) * 1e3,
                "tokens_per_second": batch * (workload.new_tokens - 1) / (whole - prompt),
                "steps": median(steps),
                "seconds": {"prompt": prompts, "whole": wholes},
            }
        )
    on_gpu = engine.runner.device.type == "cuda"
    return {
        "name": "decode",
        "workload": workload.model_dump(),
        "billion_parameters": sum(one.numel() for one in engine.model.parameters()) / 1e9,
        "startup_seconds": startup,
        "results": results,
        "machine": describe(("torch",)) | {"gpu": torch.cuda.get_device_name() if on_gpu else "cpu"},
    }


def table(result: dict[str, Any]) -> str:
    """The result in lines."""
    lines = [f"start-up {result['startup_seconds']:.1f} s on {result['machine']['gpu']}"]
    lines.append("batch   prompt tokens/s   ms a token   tokens/s")
    for one in result["results"]:
        lines.append(
            f"{one['batch']:5d}{one['prompt_tokens_per_second']:18,.0f}{one['ms_per_token']:13.3f}"
            f"{one['tokens_per_second']:11,.0f}"
        )
    return "\n".join(lines) + "\n"


def failures(result: dict[str, Any]) -> list[str]:
    """Nothing can fail apart from the whole."""
    return []


def _engine(workload: Workload) -> Engine:
    dtype = getattr(torch, workload.dtype)
    folder = Path(workload.model)
    if any(folder.glob("*.safetensors")):
        model = load_model(folder, workload.device, dtype, weights=workload.weights)
    else:
        model = LanguageModel(ModelConfig.from_pretrained(workload.model), workload.device, dtype)
        spread(model)
        if workload.weights == "float8":
            store_in_float8(model)
            if model.head_weight.is_cuda:
                torch.cuda.empty_cache()  # of the weights in `dtype`, which are gone
    most = max(workload.batches)
    tokens = workload.prompt_tokens + workload.new_tokens + 32
    settings = EngineConfig(
        block_size=64,
        num_blocks=most * -(-tokens // 64) + 1,
        max_sequences=most,
        max_step_tokens=8192,
        prefix_caching=False,
        draft_tokens=workload.draft_tokens or None,
        always_draft=True,
        cache=workload.cache,
    )
    if workload.acceptance is not None:
        return PretendingEngine(model, speculative=True, settings=settings, acceptance=workload.acceptance)
    return Engine(model, speculative=workload.draft_tokens > 0, settings=settings)


@torch.no_grad()
def spread(model: LanguageModel) -> None:
    """Random weights under which tokens differ and route to different experts, made on the device."""
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1:
            tensor.fill_(1.0 if "norm" in name else 0.0)
        else:
            tensor.normal_(0, 1.0 if "embed" in name else tensor.shape[-1] ** -0.5)


def _seconds(engine: Engine, batch: int, new_tokens: int, workload: Workload, dice: random.Random) -> tuple[float, int]:
    """Seconds and steps for `batch` answers of `new_tokens`."""
    vocabulary = engine.model.config.vocab_size
    prompts = [[dice.randrange(10, vocabulary - 10) for _ in range(workload.prompt_tokens)] for _ in range(batch)]
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    if isinstance(engine, PretendingEngine):
        engine.forget_luck()
    _wait(engine)
    begun, steps = time.perf_counter(), 0
    for prompt in prompts:
        engine.add_request(prompt, params)
    while engine.has_work:
        engine.step()
        steps += 1
    _wait(engine)
    return time.perf_counter() - begun, steps


def _wait(engine: Engine) -> None:
    if engine.runner.device.type == "cuda":
        torch.cuda.synchronize()

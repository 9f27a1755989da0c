"""One arm of the training benchmark: full updates of `benthic.train.step`, as the trainer makes them, timed.

    python -m benchmarks.train_arm ARM_AS_JSON RESULT_FILE [PROFILE_FILE]

Weights are drawn on the device (the values do not matter, and a processor takes minutes for billions of them), tokens
evenly from the whole vocabulary. A step lasts from its start to the next one's start on the device's clock, so that a
host that runs ahead is neither credited nor charged.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from benchmarks.gpu_timing import GpuStopwatch, measured_limits
from benchmarks.machine import describe
from benchmarks.step_profile import profiled
from benchmarks.train_arms import Arm, model_config, planned, train_config
from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.config.train import TrainConfig
from benthic.data import Batch
from benthic.files import write_atomic
from benthic.log import logger, to_stderr
from benthic.model.language_model import LanguageModel
from benthic.plan.flops import training_flops_per_token
from benthic.plan.memory import training_memory
from benthic.train.balance import max_violation
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place
from benthic.train.step import Launched, Update, finish, launch

GIB = 2**30


def measure(arm: Arm, device: str, profile: Path | None = None) -> dict[str, Any]:
    """Warm up, time, and, where `profile` is a file, take two more steps under the profiler for it."""
    limits = measured_limits(GpuStopwatch()) if device == "cuda" else None
    if device == "cuda":
        torch.cuda.empty_cache()  # what measuring took is no part of the arm's memory
    step = make_step(arm, device)
    for _ in range(arm.warm_up):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, last = timed_steps(step, arm.steps, device)
    result = arm_result(arm, seconds) | {
        "loss": float(last.loss),
        "max_violation": [round(float(max_violation(load)), 3) for load in last.loads.values()],
    }
    if device == "cuda":
        result |= {
            "memory": memory(arm),
            "limits": limits.plain(),
            "matmul_share": result["tflops"] * 1e12 / limits.bf16,
        }
    if profile is not None:
        found = profiled(step, limits)
        write_atomic(profile, json.dumps({"arm": arm.model_dump(), "step_seconds": result["step_seconds"]} | found))
    return result


def make_step(arm: Arm, device: str) -> Callable[[], Update]:
    """A function that makes the next update, on a new batch each time."""
    config = train_config(arm)
    model, optimizer = build(config, device)
    if arm.compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    batches = random_batches(config)
    ahead: Launched | None = None
    tokens = arm.batch * arm.sequence_length
    # A folder for the report of a batch that fails; it outlives the process, since the error names it.
    failures = Path(tempfile.gettempdir()) / "benthic-bench-failures"

    def step() -> Update:
        nonlocal ahead
        launched = ahead or launch(model, optimizer, next(batches), Place(1, 0, config.steps), config)
        # As the trainer on a GPU: the next update is launched before this one is waited for.
        place = Place(launched.place.step + 1, launched.place.tokens + tokens, config.steps)
        ahead = launch(model, optimizer, next(batches), place, config, launched)
        return finish(launched, failures)

    return step


def build(config: TrainConfig, device: str) -> tuple[LanguageModel, Optimizer]:
    """Model and optimiser as the trainer makes them, filled on the device."""
    dtype = torch.float32 if config.precision.compute == "float32" else torch.bfloat16
    model = LanguageModel(config.model, device, dtype)
    fill(model, config.seed)
    if config.precision.compute == "float8":
        from benthic.model.float8 import use_float8

        use_float8(model)
    return model, Optimizer(model, config.optimizer, config.precision.moments)


@torch.no_grad()
def fill(model: LanguageModel, seed: int) -> None:
    """First values as the manifest says, drawn where the tensors are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.manual_seed(seed)
    for row in parameters(model.config):
        if row.initialisation == "normal":
            tensors[row.name].normal_(std=model.config.initializer_range)
        else:
            tensors[row.name].fill_(1.0 if row.initialisation == "ones" else 0.0)


def random_batches(config: TrainConfig) -> Iterator[Batch]:
    """Tokens drawn evenly from the vocabulary, on the host: int64 [B, S + 1], never the same batch twice."""
    stream = torch.Generator().manual_seed(config.seed)
    shape = (config.batch.micro_sequences, config.data.sequence_length + 1)
    while True:
        tokens = torch.randint(config.model.vocab_size, shape, generator=stream)
        yield Batch(tokens, torch.zeros_like(tokens))


def timed_steps(step: Callable[[], Any], count: int, device: str) -> tuple[list[float], Any]:
    """Seconds of each of `count` steps, and what the last one returned."""
    last = None
    if device != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            last = step()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)], last
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        last = step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)], last


def arm_result(arm: Arm, seconds: list[float]) -> dict[str, Any]:
    """Speed of an arm from its steps: tokens/s and causal TFLOP/s of the median step, and the quartiles."""
    config = model_config(arm.model)
    tokens = arm.batch * arm.sequence_length
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return {
        "arm": arm.model_dump(),
        "parameters": parameter_count(config),
        "flops_per_token": training_flops_per_token(config, arm.sequence_length),
        "step_seconds": {"median": middle, "first_quartile": low, "third_quartile": high, "all": seconds},
        "tokens_per_second": tokens / middle,
        "tflops": tokens / middle * training_flops_per_token(config, arm.sequence_length) / 1e12,
    }


def parameter_count(config: ModelConfig) -> int:
    """Parameters, routing biases left out."""
    return sum(torch.Size(row.shape).numel() for row in parameters(config) if row.group != "routing_bias")


def memory(arm: Arm) -> dict[str, float]:
    """GiB at the highest moment since the warm-up, beside what the planner says."""
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "planned_gib": training_memory(model_config(arm.model), planned(arm)).allocated / GIB,
    }


def main(arm: str, kept: str, profile: str | None = None) -> None:
    """The process of one arm."""
    to_stderr()
    chosen = Arm(**json.loads(arm))
    machine = describe(("torch", "triton")) | {"gpu": torch.cuda.get_device_name()}
    if chosen.trainer == "transformers":
        from benchmarks.transformers_arm import measure as measure_transformers

        result = measure_transformers(chosen)
    else:
        result = measure(chosen, "cuda", Path(profile) if profile else None)
    write_atomic(Path(kept), json.dumps({"machine": machine} | result))
    logger.info("%s: %.0f tokens/s, median of %d", chosen.model, result["tokens_per_second"], chosen.steps)


if __name__ == "__main__":
    main(*sys.argv[1:])

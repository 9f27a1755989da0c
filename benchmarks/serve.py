"""A server under load: random prompts of exact length, sent at a rate or by a number of clients, and timed chunk by
chunk as `vllm bench serve` does it (benchmarks/serving_metrics.py has the definitions).

Prompts are token ids, so that no tokenizer changes their length, and no two share a beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from benchmarks.machine import describe
from benchmarks.serving_client import ServingClient
from benchmarks.serving_metrics import BOUNDS, Timed, figures
from benthic.cli.remote import Remote, server_address
from benthic.config import ModelConfig
from benthic.config.settings import Settings
from benthic.errors import ConfigError, RunError

NAMES = {"ttft": "to the first token", "tpot": "a token after it", "itl": "between chunks", "e2el": "a request"}


class Workload(Settings):
    """What is asked. `rate` is requests a second, arriving at random (Poisson); without it all come at once, of which
    at most `concurrency` are on their way. `goodput` bounds milliseconds of ttft, tpot and e2el."""

    url: str
    model: str
    vocabulary: int | None = Field(None, ge=2)
    requests: int = Field(100, ge=1)
    rate: float | None = Field(None, gt=0)
    concurrency: int | None = Field(None, ge=1)
    prompt_tokens: int = Field(512, ge=1)
    new_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    warm_up: int = Field(1, ge=0)
    request_seconds: float = Field(600.0, gt=0)
    goodput: dict[str, float] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)

    @field_validator("goodput")
    @classmethod
    def _known_bounds(cls, goodput: dict[str, float]) -> dict[str, float]:
        for name, bound in goodput.items():
            if name not in BOUNDS or not bound > 0:
                raise ValueError(f"{name}:{bound:g} is no bound; allowed are {', '.join(BOUNDS)} and milliseconds")
        return goodput


def measure(workload: Workload, key: str | None = None) -> dict[str, Any]:
    """Warm up, ask, time. Raises ConfigError and RequestError before the first request, RunError where warming up
    fails; what fails later is counted and named."""
    vocabulary, name = _vocabulary(workload), _server_name(workload, key)
    machine = describe(())
    asked = [_asked(workload, name, prompt) for prompt in prompts(workload, vocabulary)]
    timed, seconds = asyncio.run(_load(workload, key, asked))
    return {
        "name": "serve",
        "workload": workload.model_dump(),
        "served_model": name,
        "machine": machine,
        **figures(timed, seconds, workload.goodput),
    }


def prompts(workload: Workload, vocabulary: int) -> list[list[int]]:
    """Token ids of the requests for warming up and then of those measured."""
    dice = np.random.default_rng(workload.seed)
    shape = (workload.warm_up + workload.requests, workload.prompt_tokens)
    return dice.integers(0, vocabulary, shape).tolist()


def arrivals(workload: Workload) -> list[float]:
    """Seconds at which requests are sent. As vLLM does, random gaps are stretched so that the last comes at
    requests / rate, and the rate is exact."""
    if workload.rate is None:
        return [0.0] * workload.requests
    dice = np.random.default_rng((workload.seed, 1))
    times = np.cumsum(dice.exponential(1 / workload.rate, workload.requests))
    return (times * (workload.requests / workload.rate / times[-1])).tolist()


async def _load(workload: Workload, key: str | None, asked: list[dict[str, Any]]) -> tuple[list[Timed], float]:
    client = ServingClient(server_address(workload.url), key)
    seats = contextlib.nullcontext() if workload.concurrency is None else asyncio.Semaphore(workload.concurrency)

    async def one(body: dict[str, Any]) -> Timed:
        async with seats:
            return await client.time(body, workload.request_seconds)

    try:
        warming, measured = asked[: workload.warm_up], asked[workload.warm_up :]
        for done in await asyncio.gather(*map(one, warming)):
            if done.error is not None:
                raise RunError(f"{workload.url} failed while warming up: {done.error}")
        began, tasks = time.perf_counter(), []
        for due, body in zip(arrivals(workload), measured, strict=True):
            if (pause := began + due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(one(body)))
        return list(await asyncio.gather(*tasks)), time.perf_counter() - began
    finally:
        client.close()


def _asked(workload: Workload, name: str, prompt: list[int]) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": prompt,
        "max_tokens": workload.new_tokens,
        "ignore_eos": True,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _vocabulary(workload: Workload) -> int:
    """Ids below it are drawn."""
    if workload.vocabulary is not None:
        return workload.vocabulary
    try:
        return ModelConfig.from_pretrained(workload.model).vocab_size
    except ConfigError as error:
        raise ConfigError(
            f"the vocabulary of --model {workload.model!r} is unknown, as it is no folder or preset: {error.message}",
            hint="give --vocabulary: prompts are made of token ids below it",
        ) from None


def _server_name(workload: Workload, key: str | None) -> str:
    """What the server calls the model: as given, or as the folder is called, or its only one."""
    names = Remote(workload.url, key, workload.model).names
    for one in (workload.model, Path(workload.model).resolve().name, *names[: len(names) == 1]):
        if one in names:
            return one
    raise ConfigError(f"{workload.url} has no {workload.model!r}, but {len(names)} models: {', '.join(names)}")


def failures(result: dict[str, Any]) -> list[str]:
    """Each kind of error, and how often it came."""
    return [f"{count} of {result['workload']['requests']}: {error}" for error, count in result["errors"].items()]


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    workload, machine = result["workload"], result["machine"]
    rate = "all at once" if workload["rate"] is None else f"{workload['rate']:g} requests/s, Poisson"
    seats = "" if workload["concurrency"] is None else f", at most {workload['concurrency']} on their way"
    lines = [
        f"{result['served_model']}: {workload['requests']} requests of {workload['prompt_tokens']} tokens for "
        f"{workload['new_tokens']}; {rate}{seats}",
        f"from {machine['processor']}, {machine['cores']} cores",
        "",
        f"completed {result['completed']}, failed {result['failed']}, in {result['duration']:.2f} s",
        f"requests/s {result['request_throughput']:.2f}   output tokens/s {result['output_throughput']:,.1f}   "
        f"all tokens/s {result['total_token_throughput']:,.1f}",
    ]
    if workload["goodput"]:
        bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in workload["goodput"].items())
        lines.append(f"goodput {result['request_goodput']:.2f} requests/s within {bounds}")
    lines += ["", f"{'ms':<26}{'mean':>10}{'median':>10}{'p90':>10}{'p99':>10}"]
    for name, text in NAMES.items():
        values = "".join(f"{result[f'{kind}_{name}_ms']:>10.2f}" for kind in ("mean", "median", "p90", "p99"))
        lines.append(f"{name.upper() + ', ' + text:<26}{values}")
    return "\n".join(lines) + "\n"

"""What a client of a server measures, defined as `vllm bench serve` defines it (vLLM 0.26, vllm/benchmarks/serve.py).

- TTFT: from just before a request is sent until its first chunk with a choice.
- ITL: between neighbouring chunks with a choice. A chunk may hold several tokens, or none.
- E2EL: until the last chunk with a choice; the chunk of usage does not count.
- TPOT: (E2EL - TTFT) / (output tokens - 1) of requests of more than one token, by the server's usage.
- Throughputs: over the time from before the first request until all are read. Goodput: of requests that keep each bound
  of milliseconds; a request of one token has a TPOT of 0 there.
- Percentiles are numpy's linear ones, deviations those of the whole population. Failed requests count in none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BOUNDS = ("ttft", "tpot", "e2el")
PERCENTILES = (90, 99)


@dataclass(slots=True)
class Timed:
    """One request; times in seconds. It failed where `error` says why."""

    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds a token behind the first, where there are such."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def figures(requests: Sequence[Timed], seconds: float, goodput: Mapping[str, float]) -> dict[str, Any]:
    """All figures under the names of vLLM's result files; `goodput` bounds are in milliseconds."""
    done = [one for one in requests if one.error is None]
    prompt = sum(one.prompt_tokens for one in done)
    output = sum(one.output_tokens for one in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "errors": dict(Counter(one.error for one in requests if one.error is not None).most_common()),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "request_goodput": sum(_keeps(one, goodput) for one in done) / seconds if goodput else None,
    }
    found |= _spread("ttft", [one.ttft for one in done])
    found |= _spread("tpot", [one.tpot for one in done if one.tpot is not None])
    found |= _spread("itl", [gap for one in done for gap in one.itl])
    return found | _spread("e2el", [one.latency for one in done])


def _keeps(one: Timed, bounds: Mapping[str, float]) -> bool:
    values = {"ttft": one.ttft, "tpot": one.tpot or 0.0, "e2el": one.latency}
    return all(values[name] <= bound / 1000 for name, bound in bounds.items())


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    """In milliseconds; zeros where nothing was measured, as vLLM's."""
    values = np.array(seconds or [0.0]) * 1000
    found = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return found | {f"p{rank}_{name}_ms": float(np.percentile(values, rank)) for rank in PERCENTILES}

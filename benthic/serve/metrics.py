"""Prometheus metrics, under vLLM's names where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from benthic.serve.engine_client import EngineClient

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

_SUMS = {
    "vllm:prompt_tokens": ("Tokens of the prompts of ended answers.", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens of ended answers.", "completion_tokens"),
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the cache.", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", "cached_tokens"),
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted by the prediction layers.", "drafted_tokens"),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that were right.", "accepted_tokens"),
    "vllm:num_preemptions": ("Requests put back because blocks ran out.", "preemptions"),
    "benthic:engine_steps": ("Calls of the model.", "steps"),
}


class Metrics:
    """What the server counts itself, beside what the engine tells."""

    def __init__(self, model: str, client: EngineClient) -> None:
        self._label, self._client = {"model_name": model}, client
        self._registry = CollectorRegistry()
        self._registry.register(self)
        names = ("model_name",)
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Until the first token.", _FIRST)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "From token to token.", _BETWEEN)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Until the last token.", _WHOLE)
        self._ends = Counter(
            "vllm:request_success", "Answers that ended.", (*names, "finished_reason"), registry=self._registry
        )
        self._responses = Counter(
            "benthic:http_responses", "By path and status.", (*names, "path", "status"), registry=self._registry
        )

    def first_token(self, seconds: float) -> None:
        """An answer's first token came."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """Another one came."""
        self._between.observe(seconds)

    def answered(self, seconds: float) -> None:
        """The last one came."""
        self._whole.observe(seconds)

    def finished(self, reason: str, answers: int = 1) -> None:
        """Answers ended: stop, length, error, abort."""
        self._ends.labels(**self._label, finished_reason=reason).inc(answers)

    def responded(self, path: str, status: int) -> None:
        """A response began; `path` is one of the server's own."""
        self._responses.labels(**self._label, path=path, status=str(status)).inc()

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine tells; called by the registry."""
        now, before = self._client.counts, self._client.totals.counts
        blocks = now.blocks - now.free_blocks
        yield self._gauge("vllm:num_requests_running", "Answers that the engine computes.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Answers that wait.", now.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use.", blocks / max(1, now.blocks))
        yield self._gauge("benthic:engine_silence_seconds", "Since the engine's last step.", self._client.silence)
        yield self._sum("benthic:engine_restarts", "Engines that ended.", self._client.totals.restarts)
        yield from self._loads()
        for name, (text, field) in _SUMS.items():
            yield self._sum(name, text, getattr(now, field) + getattr(before, field))

    def _loads(self) -> Iterator[Metric]:
        labels = (*self._label, "layer")
        ratio = GaugeMetricFamily(
            "benthic:expert_load_max_over_mean",
            "Tokens of a layer's busiest expert over the mean, lately.",
            labels=labels,
        )
        unused = GaugeMetricFamily(
            "benthic:experts_unused", "Experts of a layer that got no token since the engine began.", labels=labels
        )
        for one in self._client.loads:
            values = (*self._label.values(), str(one.layer))
            ratio.add_metric(values, one.max_over_mean)
            unused.add_metric(values, one.unused)
        yield ratio
        yield unused

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry)
        return whole.labels(**self._label)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=tuple(self._label))
        family.add_metric(tuple(self._label.values()), value)
        return family

    def _sum(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=tuple(self._label))
        family.add_metric(tuple(self._label.values()), value)
        return family

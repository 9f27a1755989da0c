"""Expert load, simulated: how many tokens each expert and each device gets, and what a token sends.

Scores are drawn, the router is the model's own rule (V3: top groups by the sum of their two best, then the top K
inside them; V2: groups by their best), and experts lie on devices and nodes in contiguous blocks, as released.

    random    every expert's logit has the same distribution
    skewed    experts have popularities: a normal offset of `skew` times the logits' own spread
    balanced  skewed, after the bias rule of loss-free balancing (arXiv:2408.15664) has settled

MaxVio = largest load / mean load - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benthic.config.model import ModelConfig
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

Routing = Literal["random", "skewed", "balanced"]

PIECE = 16384
"""Tokens routed at a time, so that memory does not grow with the batch."""
BALANCING_STEPS = 80
BALANCING_TOKENS = 2048
"""Updates, and tokens in each, that let the bias of "balanced" settle before it is measured. The proportional rule of
the same paper (bias += rate * error) gets there in fewer updates than the sign rule; the resting place is the same."""


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One simulated batch. Loads are (token, expert) pairs; traffic counts places that hold a chosen expert."""

    routing: Routing
    tokens: int
    per_expert: tuple[int, ...]
    per_device: tuple[int, ...]
    max_violation: float
    device_violation: float
    devices_per_token: float
    nodes_per_token: float

    @property
    def idle_experts(self) -> int:
        """Experts no token chose."""
        return self.per_expert.count(0)


def simulate(
    config: ModelConfig,
    routing: Routing = "random",
    *,
    tokens: int = 16384,
    devices: int = 64,
    nodes: int = 8,
    group_limit: bool = True,
    skew: float = 0.5,
    seed: int = 0,
) -> ExpertLoad:
    """Route `tokens` tokens with drawn scores. `group_limit=False` lets a token choose from all groups."""
    import numpy

    _check(config, tokens, devices, nodes, skew)
    random = numpy.random.default_rng(seed)
    experts = config.n_routed_experts
    popularity = random.normal(0.0, skew, experts) if routing != "random" else numpy.zeros(experts)
    bias = numpy.zeros(experts)
    if routing == "balanced":
        bias = _settled_bias(config, random, popularity, group_limit)
    per_expert = numpy.zeros(experts, dtype=numpy.int64)
    device_visits = node_visits = 0
    for start in range(0, tokens, PIECE):
        scores = _scores(random, min(PIECE, tokens - start), popularity)
        chosen = choose(config, scores, bias, group_limit)  # [T, K]
        per_expert += numpy.bincount(chosen.ravel(), minlength=experts)
        device_visits += _visits(chosen // (experts // devices), devices)
        node_visits += _visits(chosen // (experts // nodes), nodes)
    per_device = per_expert.reshape(devices, -1).sum(1)
    return ExpertLoad(
        routing=routing,
        tokens=tokens,
        per_expert=tuple(per_expert.tolist()),
        per_device=tuple(per_device.tolist()),
        max_violation=float(per_expert.max() / per_expert.mean() - 1),
        device_violation=float(per_device.max() / per_device.mean() - 1),
        devices_per_token=device_visits / tokens,
        nodes_per_token=node_visits / tokens,
    )


def choose(config: ModelConfig, scores: ndarray, bias: ndarray, group_limit: bool = True) -> ndarray:
    """The K experts [T, K] of each token by the model's rule; scores [T, E] unbiased, bias [E]."""
    import numpy

    tokens, experts = scores.shape
    selection = scores + bias
    groups, kept = config.n_group, config.topk_group
    if group_limit and kept < groups:
        grouped = selection.reshape(tokens, groups, -1)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_scores = numpy.partition(grouped, -best, axis=-1)[..., -best:].sum(-1)  # [T, G]
        dropped = numpy.argpartition(-group_scores, kept - 1, axis=-1)[:, kept:]
        numpy.put_along_axis(grouped, dropped[:, :, None], -numpy.inf, axis=1)
        selection = grouped.reshape(tokens, experts)
    chosen = config.num_experts_per_tok
    return numpy.argpartition(-selection, chosen - 1, axis=-1)[:, :chosen]


def _scores(random: Generator, tokens: int, popularity: ndarray) -> ndarray:
    import numpy

    logits = random.normal(size=(tokens, popularity.size)) + popularity
    return 1 / (1 + numpy.exp(-logits))


def _settled_bias(config: ModelConfig, random: Generator, popularity: ndarray, group_limit: bool) -> ndarray:
    import numpy

    bias = numpy.zeros(popularity.size)
    for rate in numpy.geomspace(0.05, 0.005, BALANCING_STEPS):
        chosen = choose(config, _scores(random, BALANCING_TOKENS, popularity), bias, group_limit)
        load = numpy.bincount(chosen.ravel(), minlength=popularity.size)
        bias += rate * numpy.clip(1 - load / load.mean(), -1, 1)
    return bias


def _visits(places: ndarray, number: int) -> int:
    import numpy

    hit = numpy.zeros((places.shape[0], number), dtype=bool)
    numpy.put_along_axis(hit, places, True, axis=1)
    return int(hit.sum())


def _check(config: ModelConfig, tokens: int, devices: int, nodes: int, skew: float) -> None:
    if not config.n_routed_experts:
        raise ConfigError("the model has no routed experts, so there is no expert load to simulate")
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}; it must be at least 1")
    if skew < 0:
        raise ConfigError(f"skew is {skew}; it must be at least 0")
    for name, places in (("devices", devices), ("nodes", nodes)):
        if places < 1 or config.n_routed_experts % places:
            raise ConfigError(f"{name} is {places}; it must divide n_routed_experts ({config.n_routed_experts})")
    if devices % nodes:
        raise ConfigError(f"nodes is {nodes}; it must divide devices ({devices})")

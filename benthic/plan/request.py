"""What is asked of the planner, and the decisions it takes where nothing was asked, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from benthic.config import ModelConfig, Settings
from benthic.config.model import Positive
from benthic.errors import ConfigError
from benthic.plan.devices import find_device
from benthic.plan.inference import AttentionLayout, Serving, check, fewest_gpus
from benthic.plan.kv_cache import CacheFormat
from benthic.plan.layout import Objective
from benthic.plan.operations import Recomputation
from benthic.plan.parameters import WeightFormat, stored_format
from benthic.plan.training import TrainingPrecision


class PlanRequest(Settings):
    """What is asked about a model. None means: chosen by the planner, which prints its choice."""

    device: str = "h100"
    gpus: Positive | None = None
    """All there are: training uses every one of them, serving as few as hold the model."""
    serving_gpus: Positive | None = None
    attention: AttentionLayout | None = None
    context: Positive = 4096
    batch: Positive | None = None
    sequence_length: Positive = 4096
    weights: WeightFormat | None = None
    cache: CacheFormat = "bf16"
    acceptance: Annotated[float, Field(ge=0, le=1)] = 0.85
    """Share of drafts accepted; 0.85 to 0.90 published for V3 (technical report, section 5.4.3)."""
    layout: str | None = None
    """Of training, as in ParallelConfig.parse."""
    objective: Objective | None = None
    """What a search of all layouts is for; None tries a few."""
    sequences: Positive | None = None
    """In one training step, all GPUs together."""
    micro_batch: Positive = 1
    precision: TrainingPrecision | None = None
    recomputation: Recomputation | None = None
    tokens: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e12
    dollars_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def resolve_serving(config: ModelConfig, request: PlanRequest) -> tuple[Serving, list[str]]:
    """The serving layout asked for, with what was left open decided, and a sentence for each decision."""
    device = find_device(request.device)
    choices = []
    weights = request.weights
    if weights is None:
        weights = stored_format(config)
        if weights == "fp8" and "fp8" not in device.peak:
            weights = "bf16"
            choices.append(f"weights in bf16, not in fp8 as stored: {device.title} has no fp8 arithmetic")
        else:
            choices.append(f"weights in {weights}, as stored")
    attention = request.attention
    if attention is None:
        attention = "data" if config.kv_lora_rank and config.n_routed_experts else "tensor"
        why = "the latent cannot be divided by heads" if attention == "data" else "heads divide weights and cache"
        choices.append(f"attention spread by {attention} parallelism: {why}")
    serving = Serving(device, request.serving_gpus or 1, attention, weights, request.cache)
    if request.serving_gpus is None:
        gpus, why = _serving_gpus(config, request, serving)
        serving = replace(serving, gpus=gpus)
        choices.append(why)
    check(config, serving)
    if request.context > config.max_position_embeddings:
        choices.append(f"{request.context:,} positions are more than the model's {config.max_position_embeddings:,}")
    return serving, choices


def _serving_gpus(config: ModelConfig, request: PlanRequest, serving: Serving) -> tuple[int, str]:
    fewest = fewest_gpus(config, serving, request.batch or 1, request.context)
    if fewest is None:
        return 1, "served by 1 GPU, which does not hold it: no power of two up to 1,024 does"
    limit = request.gpus or fewest
    if fewest <= limit:
        return fewest, f"served by {fewest} GPUs: the smallest power of two that holds weights and cache"
    powers = (2**power for power in range(limit.bit_length()))
    most = max(gpus for gpus in powers if _divides(config, serving, gpus))
    return most, f"served by {most} GPUs, which do not hold it: {fewest} are the fewest that do"


def _divides(config: ModelConfig, serving: Serving, gpus: int) -> bool:
    try:
        check(config, replace(serving, gpus=gpus))
    except ConfigError:
        return False
    return True

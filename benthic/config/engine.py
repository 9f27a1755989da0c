"""EngineConfig: what one engine may hold and do at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benthic.config.model import Positive
from benthic.config.settings import Settings

WeightStorage = Literal["auto", "plain", "float8"]
CacheStorage = Literal["plain", "float8"]


class EngineConfig(Settings):
    """Sizes of one engine.

    The cache has `num_blocks` blocks of `block_size` tokens (GPU kernels are fastest at multiples of 64); None takes
    `memory_share` of the memory that is free once the model is loaded, and never more than `max_sequences` of the
    model's longest texts need. A step computes at most `max_step_tokens` tokens, so that a long prompt holds the others
    up by no more than that. `draft_tokens` are tried a step where the engine speculates; None takes one for each
    prediction layer. Drafts rest while they make decoding slower, unless `always_draft`. On a GPU decoding is captured
    in `cuda_graphs`.

    `weights` "float8" keeps matrices in FP8, as stored or quantised at load, "plain" in the model's dtype; "auto" keeps
    those that are stored in FP8 where the GPU multiplies them. `cache` "float8" keeps latents in FP8, 656 bytes a token
    and layer of DeepSeek-V3 instead of 1,152.
    """

    weights: WeightStorage = "auto"
    cache: CacheStorage = "plain"

    block_size: Positive = 64
    num_blocks: Positive | None = None
    memory_share: float = Field(0.8, gt=0, le=1)
    max_sequences: Positive = 256
    max_step_tokens: Positive = 2048
    max_waiting: Positive | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    always_draft: bool = False
    draft_tokens: int | None = Field(None, ge=1, le=16)

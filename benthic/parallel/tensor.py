"""Tensor parallelism of a model with latent attention: its heads, feed-forward widths and words split over ranks.

    between sublayers    every rank its piece of the positions: residual stream, norms, router
    attention            what queries and latents are compressed to is gathered, C + R and q_lora_rank numbers a token
                         in place of D; each rank expands its own heads; their outputs are summed, by pieces
    feed-forward         tokens are gathered, each rank multiplies its own columns, the outputs are summed, by pieces
    routed experts       a token's K rows go from the rank that has it to the ranks of its experts, as ever

Parameters are cut before (placement.py); here each module is told, by hooks, what it gets from the others and gives
them. Without gradients (validation, samples) there may be a single token, so all ranks have all positions: nothing
needs gathering, and outputs are summed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benthic.config.manifest import Parameter, parameters
from benthic.config.model import ModelConfig
from benthic.parallel.collectives import gathered, reduced
from benthic.parallel.vocabulary import VocabularyEmbedding, all_words


def tensor_axis(row: Parameter) -> int | None:
    """The dimension of a parameter that tensor ranks split; None for what each of them holds whole, and for routed
    experts, which have ranks of their own."""
    return None if row.part == "routed" else row.shard_axis


def split_sublayers(model: Any, config: ModelConfig, group: dist.ProcessGroup) -> None:
    """Make a LanguageModel whose parameters are cut already work together with the other ranks of `group`."""
    decoder: Any = model.get_submodule("model")
    decoder.embed_tokens = VocabularyEmbedding(decoder.embed_tokens.weight, group)
    model.logits = all_words(model.logits, group)
    for path in _paths(config, "attention"):
        attention: Any = model.get_submodule(path)
        attention.heads //= group.size()
        queries = attention.q_b_proj if attention.compresses_queries else attention.q_proj
        queries.register_forward_pre_hook(_gathering_input(group, 1))
        attention.kv_a_proj_with_mqa.register_forward_hook(_gathering_output(group, 1))
        attention.o_proj.register_forward_hook(_summing_output(group, 1))
    for path in (*_paths(config, "dense"), *_paths(config, "shared")):
        # Tokens are alike here, so they are laid one after another in whatever order costs no copy.
        feed_forward = model.get_submodule(path)
        feed_forward.register_forward_pre_hook(_gathering_input(group, 0))
        feed_forward.register_forward_hook(_summing_output(group, 0))


def _paths(config: ModelConfig, part: str) -> Iterator[str]:
    """Modules that hold the projections of a part: `model.layers.3.self_attn`, `model.layers.3.mlp.shared_experts`."""
    rows = (row.name for row in parameters(config) if row.part == part and row.shard_axis is not None)
    yield from dict.fromkeys(name.rsplit(".", 2)[0] for name in rows)


def _gathering_input(group: dist.ProcessGroup, dimension: int) -> Callable[..., Any]:
    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        # Further inputs are of the piece alone (the same in FP8), and made again of the whole.
        return (gathered(inputs[0], group, dimension),) if torch.is_grad_enabled() else None

    return before


def _gathering_output(group: dist.ProcessGroup, dimension: int) -> Callable[..., Any]:
    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return gathered(output, group, dimension) if torch.is_grad_enabled() else None

    return after


def _summing_output(group: dist.ProcessGroup, dimension: int) -> Callable[..., Any]:
    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return reduced(output, group, dimension)
        dist.all_reduce(output, group=group)
        return output

    return after

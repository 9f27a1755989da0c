"""FLOPs a token: sums of operations.py under its conventions. The trainer's MFU is one of them over time and peak."""

from __future__ import annotations

from benthic.config import ModelConfig
from benthic.plan.operations import (
    Convention,
    Recomputation,
    decode_step,
    forward_operations,
    recomputed_operations,
    total_flops,
    whole_sequences,
)


def forward_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal", include_mtp: bool = False
) -> float:
    """Forward FLOPs a token of sequences of `sequence_length`."""
    call = whole_sequences(1, sequence_length, convention)
    return total_flops(forward_operations(config, call, include_mtp=include_mtp)) / call.tokens


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, convention: Convention = "causal", include_mtp: bool = False
) -> float:
    """Model FLOPs a trained token: three times the forward. The trainer's MFU is this over time and peak."""
    return 3 * forward_flops_per_token(config, sequence_length, convention, include_mtp)


def recomputed_flops_per_token(config: ModelConfig, sequence_length: int, recomputation: Recomputation) -> float:
    """FLOPs a token that recomputation adds to training; hardware FLOPs count them, model FLOPs do not."""
    call = whole_sequences(1, sequence_length)
    return total_flops(recomputed_operations(forward_operations(config, call), recomputation)) / call.tokens


def decode_flops_per_token(config: ModelConfig, context: int, include_mtp: bool = False) -> float:
    """FLOPs to produce one token at `context` positions from the cache; MLA attends in the latent space (absorbed)."""
    return total_flops(forward_operations(config, decode_step(1, context), include_mtp=include_mtp))

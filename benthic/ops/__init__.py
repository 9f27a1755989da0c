"""Operations the model calls: the same mathematics as `benthic.numerics.reference`, made fast, with gradients."""

from benthic.ops.attention import absorbed_attention, attention, causal_mask, document_mask
from benthic.ops.cache_write import turn_and_write_keys, turn_and_write_latents
from benthic.ops.expert_decode import few_token_experts
from benthic.ops.experts import routed_experts
from benthic.ops.few_token_linear import few_token_linear
from benthic.ops.float8_storage import experts_from_float8, linear_from_float8
from benthic.ops.latent_heads import latent_heads
from benthic.ops.likeliest import likeliest
from benthic.ops.linear_cross_entropy import linear_cross_entropy
from benthic.ops.norm import add_rms_norm, rms_norm
from benthic.ops.paged_attention import (
    absorbed_paged_attention,
    gather_latents,
    gather_rows,
    paged_attention,
    write_rows,
)
from benthic.ops.rotary import RotaryTable, rotary
from benthic.ops.route import Routing, route, router_logits
from benthic.ops.swiglu import swiglu

__all__ = [
    "RotaryTable",
    "Routing",
    "absorbed_attention",
    "absorbed_paged_attention",
    "add_rms_norm",
    "attention",
    "causal_mask",
    "document_mask",
    "experts_from_float8",
    "few_token_experts",
    "few_token_linear",
    "gather_latents",
    "gather_rows",
    "latent_heads",
    "likeliest",
    "linear_cross_entropy",
    "linear_from_float8",
    "paged_attention",
    "rms_norm",
    "rotary",
    "route",
    "routed_experts",
    "router_logits",
    "swiglu",
    "turn_and_write_keys",
    "turn_and_write_latents",
    "write_rows",
]

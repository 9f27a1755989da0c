"""Operations the model calls: the same mathematics as `benthic.numerics.reference`, made fast, with gradients."""

from benthic.ops.attention import absorbed_attention, attention, causal_mask, document_mask
from benthic.ops.experts import routed_experts
from benthic.ops.linear_cross_entropy import linear_cross_entropy
from benthic.ops.norm import rms_norm
from benthic.ops.paged_attention import absorbed_paged_attention, gather_rows, paged_attention, write_rows
from benthic.ops.rotary import RotaryTable, rotary
from benthic.ops.route import Routing, route
from benthic.ops.swiglu import swiglu

__all__ = [
    "RotaryTable",
    "Routing",
    "absorbed_attention",
    "absorbed_paged_attention",
    "attention",
    "causal_mask",
    "document_mask",
    "gather_rows",
    "linear_cross_entropy",
    "paged_attention",
    "rms_norm",
    "rotary",
    "route",
    "routed_experts",
    "swiglu",
    "write_rows",
]

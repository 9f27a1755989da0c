"""silu(gate) * up (arXiv:2002.05202). Reference: numerics/reference/experts.py."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gated activation, element by element."""
    return F.silu(gate) * up

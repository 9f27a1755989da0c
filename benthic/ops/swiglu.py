"""silu(gate) * up (arXiv:2002.05202). Reference: numerics/reference/experts.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation, element by element."""
    return F.silu(gate) * up

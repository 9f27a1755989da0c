"""Context parallelism: what ranks that have parts of the same sequences give each other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from benthic.parallel.collectives import gathered
from benthic.parallel.sequence import Share


def whole(rows: Float[Tensor, "batch positions width"], share: Share) -> Float[Tensor, "batch all_positions width"]:
    """The rows of all context ranks in the order of the sequence; gradients of a row are summed over ranks."""
    if share.group is None:
        raise ValueError("rows of other ranks were asked for by one that has none")
    stretches = gathered(rows, share.group, 1).chunk(2 * share.context, 1)
    return torch.cat([stretches[place] for place in share.order()], 1)

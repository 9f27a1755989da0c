"""A training pass over a part of each sequence, the rest of which other processes have (parallel/sequence.py).

The same layers in the same order. What is different: rotations are those of the positions held; the keys that a query
sees come in part from others; and a prediction layer's next tokens may stand on another process's side of a border, so
they are embedded again, from the ids, which every process has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Complex64, Float, Int64
from torch import Tensor

from benthic import ops
from benthic.model.attention import Span
from benthic.ops.route import Routing
from benthic.parallel.sequence import Share

if TYPE_CHECKING:
    from benthic.model.language_model import Decoder


def states_of_share(
    decoder: Decoder,
    input_ids: Int64[Tensor, "batch positions"],
    rotations: Complex64[Tensor, "positions pairs"],
    share: Share,
    documents: Int64[Tensor, "batch positions"] | None,
    num_predictions: int,
) -> tuple[Float[Tensor, "batch rows width"], list[Float[Tensor, "batch rows width"]], dict[int, Routing]]:
    """What `LanguageModel.states` gives, of the rows of `share`. All prediction layers run.

    Prediction layers have as many rows as the others. Their last, which have no token so far ahead, are given some
    token: no other row sees them, their states are to have no label, and their routing is left out.
    """
    positions = share.positions(input_ids.device)
    mask = None if documents is None else ops.document_mask(documents, positions)
    span = Span(rotations[positions], mask, share=share if share.context > 1 else None)
    main = len(decoder.layers) - num_predictions
    hidden, found = decoder.embed_tokens(input_ids[:, positions]), {}
    for index in range(main):
        hidden, found[index] = decoder.layers[index](hidden, span)
    states = [decoder.norm(hidden)]
    for depth in range(1, num_predictions + 1):
        ahead = F.pad(input_ids, (0, depth))[:, positions + depth]
        index = main + depth - 1
        state, found[index] = decoder.layers[index](decoder.embed_tokens(ahead), states[-1], span)
        states.append(state)
    routing = {
        index: _first_rows(chosen, len(input_ids), share.counted(max(0, index - main + 1)))
        for index, chosen in found.items()
        if chosen is not None
    }
    return states[0], states[1:], routing


def _first_rows(routing: Routing, sequences: int, count: int) -> Routing:
    """Of each sequence the first `count` rows."""
    if len(routing.scores) == sequences * count:
        return routing
    scores, experts, weights = (one.unflatten(0, (sequences, -1))[:, :count].flatten(0, 1) for one in routing[:3])
    return Routing(scores, experts, weights)

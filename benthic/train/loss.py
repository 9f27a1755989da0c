"""The loss of one update, in micro-batches whose gradients add up to that of the whole batch.

    L = 1/T sum CE(i, t_{i+1})  +  lambda/D sum_k 1/T sum CE_k(i, t_{i+k+1})  +  sum_layers sum alpha L_balance

(arXiv:2412.19437, equations 17 to 25.) T is the number of valid next-token labels of the *whole update*, for the
predictions too, although depth k has k fewer terms a sequence. The label of prediction k at position i is token
i+k+1: the token after the last one that depth k was given, never one it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from benthic.config.model import ModelConfig
from benthic.config.train import BalanceConfig
from benthic.data import Batch
from benthic.model.language_model import LanguageModel, States
from benthic.ops import linear_cross_entropy
from benthic.parallel.sequence import Share
from benthic.parallel.vocabulary import shared_cross_entropy
from benthic.parallel.world import ALONE, World
from benthic.train.auxiliary_loss import balance_loss
from benthic.train.balance import count_loads

IGNORED = -100
"""A label that no loss is taken at."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What a micro-batch divides by so that all of an update's add up: whole-update counts."""

    valid_tokens: int
    sequences: int


@dataclass(slots=True)
class Losses:
    """One micro-batch's part of the update: `total` to call backward on, the rest detached for the record.

    `main`, `prediction` (mean over depths, before lambda) and `balance` (after alpha) are float32 scalars;
    `loads` int64 [E] by layer.
    """

    total: Tensor
    main: Tensor
    prediction: Tensor
    balance: Tensor
    loads: dict[int, Tensor]


def labels(batch: Batch, depth: int, masked: bool, share: Share | None = None) -> Tensor:
    """Labels of depth `depth` (0: the next token), int64 [B, S - depth], from tokens [B, S + 1]; of `share` those of
    its positions.

    With `masked`, a label in another document than the position it is predicted from is ignored.
    """
    shift = depth + 1
    targets = batch.tokens[:, shift:]
    if masked:
        crosses = batch.documents[:, shift:] != batch.documents[:, :-shift]
        targets = targets.masked_fill(crosses, IGNORED)
    return targets if share is None else share.select(targets, IGNORED)


def forward(
    model: LanguageModel, batch: Batch, masked: bool, num_predictions: int, share: Share | None = None
) -> States:
    """Hidden states and routing of a micro-batch's inputs, or a share; `masked` keeps attention inside documents."""
    documents = batch.documents[:, :-1] if masked else None
    return model.states(batch.tokens[:, :-1], documents=documents, num_predictions=num_predictions, share=share)


def losses(
    model: LanguageModel, batch: Batch, scale: Scale, masked: bool, weight: float, balance: BalanceConfig,
    world: World = ALONE,
) -> Losses:  # fmt: skip
    """The part of the update's loss that `batch` holds. `weight` is lambda, the weight of the prediction loss. Where
    ranks of `world` share sequences, the part of this rank: they add up, and backward on all of them at once gives
    the gradients of the whole."""
    share = world.share(batch.tokens.shape[1] - 1)
    states = forward(model, batch, masked, model.config.num_nextn_predict_layers, share)
    return losses_of(states, model.head_weight, batch, scale, masked, weight, balance, model.config, world)


def losses_of(
    states: States,
    head: Float[Tensor, "vocabulary width"] | None,
    batch: Batch,
    scale: Scale,
    masked: bool,
    weight: float,
    balance: BalanceConfig,
    model: ModelConfig,
    world: World = ALONE,
) -> Losses:
    """`losses` of `states`. Without a `head`, on a stage of a pipeline that is not the last, only what the layers
    passed add to the loss."""
    depths, share = model.num_nextn_predict_layers, world.share(batch.tokens.shape[1] - 1)
    zero = states.hidden.new_zeros((), dtype=torch.float32)
    main = prediction = zero
    if head is not None:
        main = _cross_entropy(head, states.hidden, labels(batch, 0, masked, share), scale.valid_tokens, world)
        prediction = sum(
            (
                _cross_entropy(head, hidden, labels(batch, depth, masked, share), scale.valid_tokens * depths, world)
                for depth, hidden in enumerate(states.predictions, start=1)
            ),
            start=zero,
        )
    balanced = balance_loss(states, batch, scale.sequences, balance, model, world)
    return Losses(
        total=main + weight * prediction + balanced,
        main=main.detach(),
        prediction=prediction.detach(),
        balance=balanced.detach(),
        loads={layer: count_loads(one.experts, one.scores.shape[-1]) for layer, one in states.routing.items()},
    )


def _cross_entropy(head: Tensor, hidden: Tensor, targets: Tensor, divisor: int, world: World) -> Tensor:
    if world.tensor_group is not None:
        return shared_cross_entropy(hidden, head, targets, divisor, world.tensor_group)
    loss, _ = linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), divisor)
    return loss

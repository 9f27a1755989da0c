"""Validation: loss, exact bits per byte, balance over the whole set, and how often predictions are accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benthic.data import Batch, validation_batches
from benthic.data.tokens import TokenFile
from benthic.model.language_model import LanguageModel, States
from benthic.parallel.placement import forget_gathered
from benthic.parallel.world import ALONE, World
from benthic.train.balance import count_loads, max_violation, of_all_layers
from benthic.train.loss import IGNORED, forward, labels

if TYPE_CHECKING:  # torch's pipelining takes a while to import
    from benthic.train.pipeline import Pipeline

_ROWS = 2048
"""Positions whose logits exist at once."""


@dataclass(slots=True)
class Validation:
    """Sums over held-out text. Every token but the first of a window's context is predicted once."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    agreed: list[int] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    loads: dict[int, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text; end-of-text tokens cost bits and add no bytes."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def acceptance(self) -> list[float]:
        """By depth k: the share of positions where prediction k names the token that the main model names later."""
        return [agreed / compared for agreed, compared in zip(self.agreed, self.compared, strict=True)]

    @property
    def max_violation(self) -> float | None:
        """MaxVio over the whole set, a mean over layers (MaxVio_global); None without experts."""
        return float(max_violation(torch.stack(list(self.loads.values()))).mean()) if self.loads else None

    def row(self) -> dict[str, Any]:
        """What a validation row says."""
        return {
            "val_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "mtp_acceptance": self.acceptance,
            "max_violation_global": self.max_violation,
        }

    def __str__(self) -> str:
        shares = enumerate(self.acceptance, start=1)
        accepted = "".join(f"  prediction {depth} accepted {share:.1%}" for depth, share in shares)
        balance = "" if self.max_violation is None else f"  MaxVio {self.max_violation:.2f}"
        return f"loss {self.loss:.3f}, {self.bits_per_byte:.3f} bits per byte{accepted}{balance}"


def held_out(source: TokenFile, sequence_length: int, size: int, max_tokens: int | None) -> Iterator[Batch]:
    """Held-out text from its start, in batches of `size` windows, until `max_tokens` labels have been given."""
    given = 0
    for batch in validation_batches(source, sequence_length, size):
        if max_tokens is not None and given >= max_tokens:
            return
        given += batch.tokens[:, 1:].numel()
        yield batch


@torch.no_grad()
def validate(
    model: LanguageModel,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    masked: bool,
    world: World = ALONE,
    pipeline: Pipeline | None = None,
) -> Validation:
    """Read `batches` with `model`, each on one of the ranks that are given different data. `token_bytes` int64 [V] says
    how many bytes of text each token stands for. The ranks of a `pipeline` read a batch together, and the one where it
    ends compares it with the text."""
    depths = model.config.num_nextn_predict_layers
    total = Validation(agreed=[0] * depths, compared=[0] * depths)
    for batch, counts in _turns(batches, world):
        predictions = min(depths, batch.tokens.shape[1] - 2)
        if pipeline is None:
            states = forward(model, batch, masked, predictions)
        else:
            states = pipeline.states(batch, predictions)
        if not counts:
            continue
        if pipeline is None or pipeline.ends_here:
            _compare(total, model, states, labels(batch, 0, masked).flatten(), token_bytes)
        for layer, routing in states.routing.items():
            load = count_loads(routing.experts, routing.scores.shape[-1])
            total.loads[layer] = total.loads[layer] + load if layer in total.loads else load
    forget_gathered(model)
    return _over_ranks(total, model, world, token_bytes.device)


def _compare(total: Validation, model: LanguageModel, states: States, targets: Tensor, token_bytes: Tensor) -> None:
    """Add to `total` what the heads say of a batch whose next tokens are `targets`."""
    nats, likeliest = _head(model, states.hidden, targets)
    counted = targets[targets != IGNORED]
    total.nats += nats
    total.tokens += counted.numel()
    total.text_bytes += int(token_bytes[counted].sum())
    likeliest = likeliest.view(states.hidden.shape[:2])
    for depth, hidden in enumerate(states.predictions, start=1):
        drafted = _likeliest(model, hidden)
        # Position i of depth k and position i + k of the main model both name token i + k + 1.
        total.agreed[depth - 1] += int((drafted == likeliest[:, depth:]).sum())
        total.compared[depth - 1] += drafted.numel()


def _turns(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches of a list that all ranks walk through alike, and whether they count. Ranks pass the same
    layers together, so a turn has sequences of one length, and where there is no batch left one is read in vain."""
    for _, alike in groupby(batches, lambda batch: batch.tokens.shape[1]):
        while turn := list(islice(alike, world.layout.data)):
            yield turn[min(world.data_rank, len(turn) - 1)], world.data_rank < len(turn)


def _over_ranks(total: Validation, model: LanguageModel, world: World, device: torch.device) -> Validation:
    """The sums of all ranks."""
    if world.size == 1:
        return total
    nats = torch.tensor(total.nats, dtype=torch.float64, device=device)
    depths = len(total.agreed)
    counts = torch.tensor([total.tokens, total.text_bytes, *total.agreed, *total.compared], device=device)
    loads = of_all_layers(total.loads, model.config, device)
    world.add_up(nats, counts, *loads.values())
    tokens, text_bytes, *rest = counts.tolist()
    return Validation(float(nats), tokens, text_bytes, rest[:depths], rest[depths:], loads)


def _head(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Summed nats at valid targets, and the likeliest token of every row."""
    nats, likeliest = 0.0, []
    for rows, wanted in zip(hidden.flatten(0, 1).split(_ROWS), targets.split(_ROWS), strict=True):
        logits = (rows @ model.head_weight.T).float()
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").double())
        likeliest.append(logits.argmax(-1))
    return nats, torch.cat(likeliest)


def _likeliest(model: LanguageModel, hidden: Tensor) -> Tensor:
    rows = [(part @ model.head_weight.T).argmax(-1) for part in hidden.flatten(0, 1).split(_ROWS)]
    return torch.cat(rows).view(hidden.shape[:2])

"""One update: micro-batches, loss, backward, clip, the parameters, then the routing biases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benthic.config.train import TrainConfig
from benthic.data import Batch
from benthic.errors import NumericsError
from benthic.files import write_atomic
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import forget_gathered, gather_at_last_micro_batch
from benthic.parallel.world import ALONE, World
from benthic.train.balance import move_biases, scaled_speed
from benthic.train.disk import publish_folder, write_tensors
from benthic.train.loss import IGNORED, Losses, Scale, labels, losses
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place, value


@dataclass(frozen=True, slots=True)
class Update:
    """What one update saw: losses in nats a token, the gradient's norm before clipping, loads int64 [E] by layer."""

    step: int
    tokens: int
    learning_rate: float
    loss: float
    prediction_loss: float
    balance_loss: float
    gradient_norm: float
    loads: dict[int, Tensor]


def routing_biases(model: LanguageModel) -> dict[int, Tensor]:
    """`e_score_correction_bias` float32 [E] of every layer that has one, prediction layers included."""
    ending = ".mlp.gate.e_score_correction_bias"
    return {int(name.split(".")[2]): bias for name, bias in model.named_buffers() if name.endswith(ending)}


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """`batch` in pieces of `size` sequences."""
    for start in range(0, len(batch.tokens), size):
        yield Batch(batch.tokens[start : start + size], batch.documents[start : start + size])


def update(
    model: LanguageModel,
    optimizer: Optimizer,
    batch: Batch,
    place: Place,
    config: TrainConfig,
    failures: Path,
    world: World = ALONE,
) -> Update:
    """One update of `model` on `batch` ([B, S + 1] tokens on the model's device), this rank's share of the whole.

    Raises NumericsError before anything has changed when the loss or the gradient is not finite, and leaves the batch
    under `failures`.
    """
    masked = config.data.mask_documents
    valid = (labels(batch, 0, masked) != IGNORED).sum()
    world.add_up(valid)
    scale = Scale(int(valid), len(batch.tokens) * config.parallel.data)
    weight = value(config.prediction.weight, place)
    optimizer.zero_gradients()
    forget_gathered(model)
    parts: list[Losses] = []
    whole = len(batch.tokens) // config.batch.micro_sequences
    for number, micro in enumerate(micro_batches(batch, config.batch.micro_sequences), start=1):
        gather_at_last_micro_batch(model, number == whole, world)
        part = losses(model, micro, scale, masked, weight, config.balance)
        part.total.backward()
        part.total = part.total.detach()
        parts.append(part)
    norm = optimizer.gradient_norm()
    result = _summed(parts, float(norm), place, scale, value(config.optimizer.learning_rate, place), world)
    seen = (result.gradient_norm, result.loss, result.prediction_loss, result.balance_loss)
    if not all(map(math.isfinite, seen)):
        raise _not_finite(result, parts, optimizer, batch, failures, world)
    optimizer.step(result.learning_rate, norm)
    balance, tokens = config.balance, batch.tokens[:, 1:].numel() * config.parallel.data
    speed = scaled_speed(value(balance.speed, place), tokens, balance.reference_tokens)
    move_biases(routing_biases(model), result.loads, balance, speed)
    return result


def _summed(parts: list[Losses], norm: float, place: Place, scale: Scale, learning_rate: float, world: World) -> Update:
    sums = torch.stack([torch.stack((part.main, part.prediction, part.balance)) for part in parts]).sum(0)
    loads = {layer: torch.stack([part.loads[layer] for part in parts]).sum(0) for layer in parts[0].loads}
    world.add_up(sums, *loads.values())
    main, prediction, balance = sums.tolist()
    return Update(
        step=place.step,
        tokens=scale.valid_tokens,
        learning_rate=learning_rate,
        loss=main,
        prediction_loss=prediction,
        balance_loss=balance,
        gradient_norm=norm,
        loads=loads,
    )


def _not_finite(
    result: Update, parts: list[Losses], optimizer: Optimizer, batch: Batch, failures: Path, world: World
) -> NumericsError:
    bad_parameters = optimizer.bad_gradients()
    bad_parts = [index for index, part in enumerate(parts) if not part.total.isfinite()]
    # A bad loss names the rank it came from; a bad gradient has reached others by the time it is seen.
    culprit = world.first_true(bool(bad_parts))
    culprit = world.first_true(bool(bad_parameters)) if culprit is None else culprit
    facts = {
        "step": result.step,
        "rank": world.rank,
        "learning_rate": result.learning_rate,
        "loss": str(result.loss),
        "mtp_loss": str(result.prediction_loss),
        "balance_loss": str(result.balance_loss),
        "grad_norm": str(result.gradient_norm),
        "micro_batches_with_bad_loss": bad_parts,
        "parameters_with_bad_gradient": bad_parameters,
    }
    folder = failures / f"step-{result.step:08d}"

    def fill(partial: Path) -> None:
        write_tensors(partial / "batch.safetensors", {"tokens": batch.tokens, "documents": batch.documents})
        write_atomic(partial / "report.json", json.dumps(facts, indent=2) + "\n")

    if culprit == world.rank:
        publish_folder(folder, "the batch that failed", fill)
    where = f"loss of micro-batch {bad_parts[0]}" if bad_parts else f"gradient of {', '.join(bad_parameters[:2])}"
    if culprit != world.rank:
        where = "loss or gradient"
    if world.size > 1:
        where += f" on rank {culprit}"
    return NumericsError(
        f"update {result.step} stopped before changing any weight: {where} is not finite "
        f"(loss {result.loss:.4g}, gradient norm {result.gradient_norm:.4g})",
        hint=f"the batch and a report are in {folder}; resume with a lower optimizer.learning_rate in a new run, or "
        "look at the batch",
    )

"""One update: micro-batches, loss, backward, clip, the parameters, then the routing biases.

A GPU gets the whole update without the host waiting for any of it. What the update depends on (is everything finite,
how much to clip) is decided on the device, and the few numbers of the record come to the host together, at the end:
their copy is enqueued with the update, so that whoever waits for it does not wait for what was launched behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benthic.config.train import TrainConfig
from benthic.data import Batch
from benthic.errors import NumericsError
from benthic.files import write_atomic
from benthic.model.float8 import weights_unchanged
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import before_backward, forget_gathered
from benthic.parallel.world import ALONE, World
from benthic.train.balance import move_biases, of_all_layers, scaled_speed
from benthic.train.disk import publish_folder, write_tensors
from benthic.train.loss import IGNORED, Losses, Scale, labels, losses
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place, value

if TYPE_CHECKING:  # torch's pipelining takes a while to import
    from benthic.train.pipeline import Pipeline


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


@dataclass(frozen=True, slots=True)
class Launched:
    """An update that a GPU may still be working on.

    `numbers` (losses, norm, finite) and `loads` are the host's, but filled only when `arrived` has happened (None: they
    are there). `batch` is the host's.
    """

    place: Place
    scale: Scale
    learning_rate: float
    parts: list[Losses]
    norms: dict[str, Tensor]
    finite: Tensor
    numbers: Tensor
    loads: dict[int, Tensor]
    arrived: torch.cuda.Event | None
    batch: Batch


def launch(
    model: LanguageModel,
    optimizer: Optimizer,
    batch: Batch,
    place: Place,
    config: TrainConfig,
    before: Launched | None = None,
    world: World = ALONE,
    pipeline: Pipeline | None = None,
) -> Launched:
    """Enqueue an update on `batch`, which is the host's: this rank's share of the whole. One process alone waits for
    no device here. With a `pipeline` the gradients are made by its ranks together.

    `before` is an update that has not been finished yet: where it fails, this one changes nothing either. Raises
    NumericsError when no position of the batch has a label.
    """
    masked = config.data.mask_documents
    ranks = config.parallel.data
    scale = Scale(world.total_of_batch(int((labels(batch, 0, masked) != IGNORED).sum())), len(batch.tokens) * ranks)
    if not scale.valid_tokens:
        raise NumericsError(
            f"update {place.step} has no label: every token's next one is in another document",
            hint="turn data.mask_documents off, or train on longer documents",
        )
    weight = value(config.prediction.weight, place)
    optimizer.zero_gradients()
    forget_gathered(model)
    placed = on_device(batch, world.device if world.size > 1 else model.head_weight.device)
    with weights_unchanged(model):
        if pipeline is None:
            parts = _one_after_another(model, placed, scale, weight, config, world)
        else:
            parts = pipeline.learn(placed, scale, weight)
    optimizer.add_up_tensor_ranks()
    norms = optimizer.gradient_norms()
    norm = optimizer.joint_norm(norms)
    recorded = [torch.stack((part.main, part.prediction, part.balance, part.total)) for part in parts]
    sums = torch.stack(recorded).sum(0)
    loads = {layer: torch.stack([part.loads[layer] for part in parts]).sum(0) for layer in parts[0].loads}
    loads = of_all_layers(loads, model.config, placed.tokens.device)
    world.add_up(sums, *loads.values())
    *seen, total = sums
    finite = norm.isfinite() & total.isfinite()
    if before is not None:
        finite &= before.finite
    learning_rate = value(config.optimizer.learning_rate, place)
    optimizer.step(learning_rate, norm, finite)
    balance, tokens = config.balance, batch.tokens[:, 1:].numel() * ranks
    speed = scaled_speed(value(balance.speed, place), tokens, balance.reference_tokens)
    # Loads of zero are even loads: where the update must not happen, no bias moves.
    move_biases(routing_biases(model), {layer: load * finite for layer, load in loads.items()}, balance, speed)
    numbers = torch.stack([*seen, norm, finite.float()]).to("cpu", non_blocking=True)
    if loads:
        together = torch.stack(list(loads.values())).to("cpu", non_blocking=True)
        loads = dict(zip(loads, together.unbind(), strict=True))
    arrived = _mark(finite.device)
    return Launched(place, scale, learning_rate, parts, norms, finite, numbers, loads, arrived, batch)


def _one_after_another(
    model: LanguageModel, batch: Batch, scale: Scale, weight: float, config: TrainConfig, world: World
) -> list[Losses]:
    """Forward and backward of each micro-batch; `weight` is that of the prediction loss."""
    parts: list[Losses] = []
    micros = list(micro_batches(batch, config.batch.micro_sequences))
    for micro in micros:
        before_backward(model, micro is micros[-1], world)
        part = losses(model, micro, scale, config.data.mask_documents, weight, config.balance, world)
        part.total.backward()
        part.total = part.total.detach()
        parts.append(part)
    return parts


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """What a GPU passes when it has done all that it was given so far."""
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event()
    mark.record(torch.cuda.current_stream(device))
    return mark


def finish(launched: Launched, failures: Path, world: World = ALONE) -> Update:
    """Wait for an update and say what it saw.

    Raises NumericsError when the loss or the gradient was not finite: nothing has changed then, and the batch is left
    under `failures`, by the rank where it was seen first.
    """
    if launched.arrived is not None:
        launched.arrived.synchronize()
    loss, prediction, balance, norm, finite = launched.numbers.tolist()
    result = Update(
        step=launched.place.step,
        tokens=launched.scale.valid_tokens,
        learning_rate=launched.learning_rate,
        loss=loss,
        prediction_loss=prediction,
        balance_loss=balance,
        gradient_norm=norm,
        loads=launched.loads,
    )
    if not finite:
        raise _not_finite(result, launched, failures, world)
    return result


def on_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`. A GPU fetches it by itself, from memory that stays where it is."""
    if device.type != "cuda":
        return Batch(batch.tokens.to(device), batch.documents.to(device))
    tokens, documents = (one.pin_memory().to(device, non_blocking=True) for one in (batch.tokens, batch.documents))
    return Batch(tokens, documents)


def _not_finite(result: Update, launched: Launched, failures: Path, world: World) -> NumericsError:
    batch = launched.batch
    bad_parameters = [name for name, norm in launched.norms.items() if not norm.isfinite()]
    bad_parts = [index for index, part in enumerate(launched.parts) if not part.total.isfinite()]
    # A bad loss names the rank it came from; a bad gradient has reached others by the time it is seen.
    seen = world.first_true(bool(bad_parts))
    rank = world.first_true(bool(bad_parameters)) if seen is None else seen
    facts = {
        "step": result.step,
        "rank": rank,
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

    if rank == world.rank:
        publish_folder(folder, "the batch that failed", fill)
    where = f"loss of micro-batch {bad_parts[0]}" if bad_parts else f"gradient of {', '.join(bad_parameters[:2])}"
    if world.size > 1:
        where = f"the {where if rank == world.rank else 'loss' if seen is not None else 'gradient'} on rank {rank}"
    return NumericsError(
        f"update {result.step} stopped before changing any weight: {where} is not finite "
        f"(loss {result.loss:.4g}, gradient norm {result.gradient_norm:.4g})",
        hint=f"the batch and a report are in {folder}; resume with a lower optimizer.learning_rate in a new run, or "
        "look at the batch",
    )

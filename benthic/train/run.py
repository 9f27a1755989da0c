"""A run from config to finished model, in reading order: data, model, optimiser, updates, validation, export."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benthic.config.train import TrainConfig
from benthic.errors import ConfigError, NumericsError
from benthic.log import logger
from benthic.model.room import available_bytes
from benthic.parallel.world import World, joined
from benthic.plan.memory import TrainingMemory
from benthic.train.distributed import check_batches, check_pipeline, entered, own_device, processes_here, stage_layers
from benthic.train.export import Facts, export
from benthic.train.fit import compared, require_room
from benthic.train.progress import Lines, shown
from benthic.train.signals import StopRequest, stop_requests
from benthic.train.trainer import Trainer

ASYNCHRONOUS = ("cuda",)
"""Kinds of devices that work by themselves, and so can have the next update queued before this one is read."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `interrupted` is the signal that stopped it, after its state was saved; None at its end, when
    `model` is the finished folder and `validation` holds the last validation row. A signal that comes while the model
    is being written stops nothing any more."""

    folder: Path
    step: int
    tokens: int
    seconds: float
    validation: Mapping[str, object]
    model: Path | None = None
    interrupted: signal.Signals | None = None


def run(config: TrainConfig, folder: str | Path, resume: bool = False) -> Summary:
    """Train as `config` says in `folder`, from its newest saved state with `resume`.

    SIGINT and SIGTERM save the state and leave. Raises RunError for a folder that cannot be used, NumericsError for a
    loss or gradient that is not finite, CapacityError for a full disk.
    """
    config = resolved(config)
    # The wait for signals is outermost: where a rank dies torchrun sends the others SIGTERM, and one still says why.
    check_pipeline(config)
    where = config.parallel, config.model, own_device(config.device), stage_layers(config)
    with stop_requests() as stop, joined(*where) as world:
        check_batches(config)
        planned = _check_room(config, world)
        with entered(Path(folder), config, resume, world) as place:
            trainer = Trainer(config, place, world)
            if resume:
                trainer.restore()
                if world.leads:
                    place.write_config(config)
            began = time.monotonic()
            try:
                finished = _train(trainer, stop)
            except NumericsError:
                # All ranks stop here together, so that what is being written can still be finished.
                trainer.finish_saving()
                raise
            seconds = time.monotonic() - began
            if trainer.device.type == "cuda" and planned is not None:
                logger.info("%s", compared(planned, torch.cuda.max_memory_allocated(trainer.device)))
            return Summary(
                folder=place.path,
                step=trainer.step,
                tokens=trainer.tokens,
                seconds=seconds,
                validation=trainer.validation,
                model=place.model if finished else None,
                interrupted=None if finished else stop.received,
            )


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` with "auto" replaced by what it comes to on this machine, each choice logged with its reason."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device %s: %s", device, "a GPU is there" if device == "cuda" else "torch sees no GPU")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU", hint="benthic doctor says why; or --device cpu")
    compute = config.precision.compute
    if compute == "auto":
        compute = "bfloat16" if device == "cuda" else "float32"
        logger.info("compute %s, float32 master weights: the default on %s", compute, device)
    _say_which_auxiliary_loss(config)
    return config.replace(device=device, precision=config.precision.replace(compute=compute))


def _say_which_auxiliary_loss(config: TrainConfig) -> None:
    """The model's published record of its own training may differ from how this run trains it."""
    stated, balance = config.model.aux_loss_alpha, config.balance
    if stated is None or not config.model.n_routed_experts:
        return
    trains = 0.0 if balance.auxiliary_loss == "none" else balance.alpha
    if stated != trains:
        logger.info(
            "balance.alpha %g with balance.auxiliary_loss %s is what trains; model.aux_loss_alpha %g is only recorded "
            "in config.json",
            balance.alpha,
            balance.auxiliary_loss,
            stated,
        )


def _check_room(config: TrainConfig, world: World) -> TrainingMemory | None:
    """Refuse what cannot fit before anything is written; say and return what was planned otherwise."""
    device = own_device(config.device)
    available = available_bytes(device)
    if available is None:
        logger.info("memory: this system does not tell how much is free, so nothing is checked")
        return None
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    if device.type == "cpu" and world.size > 1:
        available //= processes_here()
        title = "a process's share of this machine"
    memory = require_room(config, title, available)
    logger.info("memory: %.2f GiB planned, %.1f GiB free on %s", memory.total / 2**30, available / 2**30, title)
    return memory


def _train(trainer: Trainer, stop: StopRequest) -> bool:
    """Whether the model was written; False when a signal came before that began."""
    config = trainer.config
    with shown(config.steps, trainer.step) as display:
        trainer.announce(display)
        trainer.meter.start()
        world = trainer.world
        stopping = world.agree(bool(stop.received))
        while trainer.step < config.steps and (trainer.launched or not stopping):
            ahead = trainer.device.type in ASYNCHRONOUS and not stopping and not _pauses(config, trainer.step + 1)
            trainer.make_update(display, ahead)
            paused = trainer.meter.pause()
            _between_updates(trainer, display)
            trainer.meter.unpause(paused)
            stopping = world.agree(bool(stop.received))
        if not stopping:
            trainer.finish_saving()
            _finish(trainer, display)
            return True
        if trainer.saved != trainer.step:
            trainer.save()
        trainer.finish_saving()
        stop.received = stop.received or signal.SIGTERM  # it came to another rank
        display.note(f"{stop.received.name}: saved step {trainer.step}; continue with --resume")
        return False


def _pauses(config: TrainConfig, step: int) -> bool:
    """Whether something is done with the model after update `step`."""
    every = (config.evaluation.every, config.sampling.every, config.checkpoint.every)
    return step == config.steps or any(step % each == 0 for each in every)


def _between_updates(trainer: Trainer, display: Lines) -> None:
    config, step = trainer.config, trainer.step
    last = step == config.steps
    if step % config.evaluation.every == 0 or last:
        trainer.validate(display, config.evaluation.final_max_tokens if last else config.evaluation.max_tokens)
    if step % config.sampling.every == 0 or last:
        trainer.sample(display)
    if step % config.checkpoint.every == 0 or last:
        trainer.save()


def _finish(trainer: Trainer, display: Lines) -> None:
    """The model folder. A run resumed at its end does this part again, and a run shortened to here validates first."""
    if trainer.validation.get("step") != trainer.step:
        trainer.validate(display, trainer.config.evaluation.final_max_tokens)
    facts = Facts(
        corpus=trainer.corpus.manifest.source,
        corpus_fingerprint=trainer.corpus.manifest.key,
        steps=trainer.step,
        tokens=trainer.tokens,
        validation={name: value for name, value in trainer.validation.items() if name not in ("step", "tokens")},
    )
    if trainer.world.leads:
        export(trainer.finished_weights(), trainer.config, trainer.tokenizer, trainer.folder.model, facts)
    trainer.world.wait_for_all()
    display.note(f"model written to {trainer.folder.model}")

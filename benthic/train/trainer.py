"""Trainer: the parts of a run assembled, and what is done to them between updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benthic.config.train import TrainConfig
from benthic.data import Loader, prepare
from benthic.errors import ConfigError, NumericsError
from benthic.log import logger
from benthic.model.float8 import weights_unchanged
from benthic.parallel.placement import forget_gathered
from benthic.parallel.world import ALONE, World
from benthic.train.background import Background, aside
from benthic.train.distributed import build_model, compute_dtype, sequences_at_a_time
from benthic.train.ema import Average, OffloadedAverage
from benthic.train.evaluation import Validation, held_out, validate
from benthic.train.export import parameter_count
from benthic.train.first_weights import set_first_weights
from benthic.train.folder import RunFolder
from benthic.train.metrics import Meter, write_loads
from benthic.train.optimizer import Optimizer
from benthic.train.progress import Lines
from benthic.train.recomputation import recompute
from benthic.train.sample import complete
from benthic.train.schedule import Place, sequences_at
from benthic.train.sharded_state import ShardedStates, is_sharded, stored_tensors
from benthic.train.state import Progress, State, newest_step, read_state, save_state, state_folder
from benthic.train.step import Launched, finish, launch, on_device, routing_biases


class Trainer:
    """Data, model, optimiser and average of one run, `step` updates old."""

    def __init__(self, config: TrainConfig, folder: RunFolder, world: World = ALONE) -> None:
        self.config = config
        self.folder = folder
        self.world = world
        self.device = torch.device(config.device) if world.size == 1 else world.device
        with world.leader_first():
            self.corpus = prepare(config.data, folder.data)
        self.tokenizer = self.corpus.tokenizer
        share = world.data_rank, config.parallel.data
        self.loader = Loader(self.corpus.train, config.data.sequence_length, config.data.seed, *share)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, but model.vocab_size is "
                f"{config.model.vocab_size}"
            )
        self._dtype = compute_dtype(config)
        self.model, self.pipeline = build_model(config, world, self.device)
        torch.manual_seed(config.seed)
        if self._newest_state() is None:
            set_first_weights(self.model, config, world)
        recompute(self.model, config.memory.recomputation)
        self.optimizer = Optimizer(
            self.model, config.optimizer, config.precision.moments, config.memory.offload_optimizer, world
        )
        self.average = self._average()
        compute = config.precision.compute
        self.meter = Meter(config.model, config.data.sequence_length, self.device, compute, world.size)
        self._saving = Background()
        self._states = ShardedStates(config.model, world.aside() if config.checkpoint.asynchronous else world)
        self.step = self.tokens = 0
        self.launched: Launched | None = None
        self.saved: int | None = None
        self.best: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}

    def _average(self) -> Average | None:
        decay = self.config.optimizer.ema_decay
        if decay is None:
            return None
        memory = self.config.memory
        # An average of masters that are elsewhere is there too, and reads them when the GPU has written them.
        if not memory.offload_average and not memory.offload_optimizer:
            return Average(self.weights(), decay)
        average = OffloadedAverage(self.weights(), decay, self.device)
        self.optimizer.before_step.append(average.let_go)
        return average

    def weights(self) -> dict[str, Tensor]:
        """float32 masters and routing biases by name: what is saved, averaged and exported."""
        biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": bias for layer, bias in self.biases.items()}
        return self.optimizer.masters | biases

    @property
    def biases(self) -> dict[int, Tensor]:
        """Routing biases by layer."""
        return routing_biases(self.model)

    def finished_weights(self) -> Mapping[str, Tensor]:
        """What the model folder holds: the last weights, or their average where the config says so. Of a model that
        is spread over ranks they are those last saved."""
        averaged = self.average is not None and self.config.checkpoint.export_average
        if self.world.size > 1:
            folder = state_folder(self.folder.checkpoints, self.step)
            return stored_tensors(folder, "average" if averaged else "weights")
        return self.average.tensors if self.average is not None and averaged else self.weights()

    def announce(self, display: Lines) -> None:
        """Say what is about to train on what."""
        display.note(
            f"{self.config.name}: {parameter_count(self.config.model):,} parameters, "
            f"{self.corpus.train.facts.tokens:,} training tokens from {self.corpus.manifest.source}"
        )

    def make_update(self, display: Lines, ahead: bool) -> None:
        """One update, counted, shown and, on its turn, logged.

        With `ahead` the next one is launched before this one is waited for, so that a GPU never stands idle; for when
        nothing looks at the model in between. It is `launched`, and what the next call waits for.
        """
        launched = self.launched or self._launch(None)
        self.launched = self._launch(launched) if ahead else None
        done = finish(launched, self.folder.failures, self.world)
        self.step, self.tokens = done.step, _tokens_after(launched)
        self.meter.count(done)
        display.updated(done, self.meter.tokens_per_second)
        logging, last = self.config.logging, self.step == self.config.steps
        if self.step % logging.every == 0 or self.step == 1 or last:
            row = self.meter.row(done, self.tokens)
            self._append("metrics.jsonl", row)
            display.row(row)
        if self.world.leads and done.loads and (self.step % logging.routing_every == 0 or last):
            write_loads(self.folder.routing, done)

    def _launch(self, before: Launched | None) -> Launched:
        """The update after `before`, which may still be computed, or after the last one."""
        step, tokens = (self.step, self.tokens) if before is None else (before.place.step, _tokens_after(before))
        place = Place(step + 1, tokens, self.config.steps)
        sequences = sequences_at(self.config.batch.sequences, sequences_at_a_time(self.config), place)
        batch = self.loader.next_batch(sequences // self.config.parallel.data)
        launched = launch(self.model, self.optimizer, batch, place, self.config, before, self.world, self.pipeline)
        if self.average is not None:
            self.average.update(self.weights(), place.step)
        return launched

    def validate(self, display: Lines, max_tokens: int | None) -> None:
        """Measure on held-out text and add a validation row."""
        found = self._validation(max_tokens)
        if not math.isfinite(found.loss):
            raise NumericsError(
                f"the loss on held-out text is {found.loss} after update {self.step}, though every update was finite",
                hint="the state saved before is intact; start a new run with a lower optimizer.learning_rate",
            )
        row: dict[str, Any] = {"step": self.step, "tokens": self.tokens} | found.row()
        if self.average is not None:
            with self.average.installed(self.model):
                averaged = self._validation(max_tokens)
            row |= {"ema_val_loss": averaged.loss, "ema_bits_per_byte": averaged.bits_per_byte}
        self._append("metrics.jsonl", row)
        self.validation = row
        if found.loss < self.best.get("val_loss", float("inf")):
            self.best = {"step": self.step, "val_loss": found.loss}
        best = "" if self.best["step"] == self.step else f"  (best {self.best['val_loss']:.3f} at {self.best['step']})"
        display.note(f"validation at step {self.step}: {found}{best}")

    def _validation(self, max_tokens: int | None) -> Validation:
        config = self.config
        batches = held_out(
            self.corpus.validation, config.data.sequence_length, config.evaluation.micro_sequences, max_tokens
        )
        placed = (on_device(batch, self.device) for batch in batches)
        token_bytes = self.corpus.token_bytes.to(self.device)
        with weights_unchanged(self.model):
            return validate(self.model, placed, token_bytes, config.data.mask_documents, self.world, self.pipeline)

    def sample(self, display: Lines) -> None:
        """Complete the config's prompts."""
        sampling = self.config.sampling
        for prompt in sampling.prompts:
            limits = sampling.max_tokens, sampling.temperature
            with weights_unchanged(self.model):
                text = complete(self.model, self.tokenizer, prompt, *limits, self._dtype, self.world)
            self._append("samples.jsonl", {"step": self.step, "prompt": prompt, "text": text})
            display.note(f"sample at step {self.step}:\n{prompt}{text}")
        forget_gathered(self.model)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.world.leads:
            self.folder.append(name, row)

    def save(self) -> None:
        """Write the training state, keep the newest ones."""
        self._saving.finish()  # before another copy of everything is made
        average = None if self.average is None else self.average.tensors
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            loader=self.loader.state_dict(),
            best=self.best,
            validation=self.validation,
            corpus=self.corpus.manifest.key,
        )
        state = State(progress, self.weights(), self.optimizer.moments(), average)
        write = save_state if self.world.size == 1 else self._states.save
        if self.config.checkpoint.asynchronous:
            self._saving.begin(partial(write, self.folder.checkpoints, aside(state), self.config.checkpoint.keep))
        else:
            write(self.folder.checkpoints, state, self.config.checkpoint.keep)
        self.saved = self.step

    def finish_saving(self) -> None:
        """Wait for a state that is still being written; errors as `save_state`'s."""
        self._saving.finish()

    def restore(self) -> None:
        """Continue from the newest saved state; from the start when the run was stopped before its first."""
        newest = self._newest_state()
        if newest is not None:
            # On the processor: a GPU that is full of this run has no room for its state twice.
            self._take_over(self._saved_state(newest, torch.device("cpu")))
        if self.world.leads:
            self.folder.rewind(self.step)
        logger.info("resumed at step %d of %d", self.step, self.config.steps)

    def _newest_state(self) -> Path | None:
        """The one that rank 0 sees: a file system may show other hosts an older list."""
        step = self.world.leaders(newest_step(self.folder.checkpoints))
        return None if step < 0 else state_folder(self.folder.checkpoints, step)

    def _saved_state(self, folder: Path, device: torch.device) -> State:
        alone = self.world.size == 1 and not is_sharded(folder)
        return read_state(folder, device) if alone else self._states.read(folder, device)

    @torch.no_grad()
    def _take_over(self, state: State) -> None:
        progress = state.progress
        progress.require_continues(self.corpus.manifest.key, self.config.steps)
        self.step = self.saved = progress.step
        self.tokens, self.best, self.validation = progress.tokens, progress.best, progress.validation
        self.loader.load_state_dict(progress.loader)
        self.optimizer.load(state.weights, state.moments, progress.step)
        for layer, bias in self.biases.items():
            bias.copy_(state.weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"])
        if self.average is not None:
            self.average.load(state.average or state.weights)


def _tokens_after(launched: Launched) -> int:
    """Tokens the run has trained on with this update, on all ranks."""
    return launched.place.tokens + launched.scale.sequences * (launched.batch.tokens.shape[1] - 1)

"""From updates to rows of `metrics.jsonl` and files of expert loads."""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benthic.config.model import ModelConfig
from benthic.errors import ConfigError
from benthic.files import atomic_file
from benthic.plan.devices import Device, find_device
from benthic.plan.flops import training_flops_per_token
from benthic.train.balance import max_violation
from benthic.train.fit import PRECISIONS
from benthic.train.step import Update


class Meter:
    """Times updates and turns them into rows. Time in which nothing trains (validation, saving) is `paused`."""

    def __init__(
        self, model: ModelConfig, sequence_length: int, device: torch.device, compute: str, ranks: int = 1
    ) -> None:
        self._flops_per_token = training_flops_per_token(model, sequence_length, include_mtp=True)
        peak = peak_flops(device, compute)
        self._peak = None if peak is None else peak * ranks
        self._device = device
        self._has_predictions = model.num_nextn_predict_layers > 0
        self._has_experts = bool(model.n_routed_experts)
        self.start()

    def start(self) -> None:
        """Begin a new stretch of timed updates."""
        self._tokens, self._began = 0, time.perf_counter()

    def pause(self) -> float:
        """The moment to hand to `unpause`."""
        return time.perf_counter()

    def unpause(self, since: float) -> None:
        """Leave the time since `pause` out of the speed."""
        self._began += time.perf_counter() - since

    def count(self, update: Update) -> None:
        """Add an update's tokens to the stretch."""
        self._tokens += update.tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed of the stretch so far."""
        return self._tokens / max(time.perf_counter() - self._began, 1e-9)

    def row(self, update: Update, tokens: int) -> dict[str, Any]:
        """The row of a logged update, whose speed is that since the row before; None where a thing does not exist."""
        speed = self.tokens_per_second
        loads = torch.stack(list(update.loads.values())) if update.loads else None
        row = {
            "step": update.step,
            "tokens": tokens,
            "loss": update.loss,
            "mtp_loss": update.prediction_loss if self._has_predictions else None,
            "balance_loss": update.balance_loss if self._has_experts else None,
            "lr": update.learning_rate,
            "grad_norm": update.gradient_norm,
            "max_violation": None if loads is None else float(max_violation(loads).mean()),
            "dead_experts": None if loads is None else int((loads == 0).sum()),
            "tokens_per_second": round(speed, 1),
            "mfu": None if self._peak is None else speed * self._flops_per_token / self._peak,
            "memory_gib": round(peak_memory_bytes(self._device) / 2**30, 3),
        }
        self.start()
        return row


def peak_flops(device: torch.device, compute: str) -> float | None:
    """Dense FLOP/s of the GPU in `compute`, from the planner's table; None for a CPU or a device it does not list."""
    if device.type != "cuda":
        return None
    found = _listed(torch.cuda.get_device_name(device))
    return None if found is None else found.peak.get(PRECISIONS[compute])


def _listed(name: str) -> Device | None:
    for word in name.lower().replace("-", " ").split():
        try:
            return find_device(word)
        except ConfigError:
            continue
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_loads(folder: Path, update: Update) -> None:
    """`loads-00000100.npz`: tokens each expert got in this update, one int64 [E] array a layer, `layer_3` by name."""
    arrays: dict[str, Any] = {f"layer_{layer}": load.cpu().numpy() for layer, load in sorted(update.loads.items())}
    content = io.BytesIO()
    np.savez(content, **arrays)
    with atomic_file(folder / f"loads-{update.step:08d}.npz") as file:
        file.write(content.getvalue())

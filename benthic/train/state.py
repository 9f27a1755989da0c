"""The training state on disk: all that the next update depends on, so that a resumed run makes the same one.

    checkpoints/step-00000100/
        state.json           updates and tokens so far, place of the loader, best validation, versions
        weights.safetensors  float32 masters and routing biases, by parameter name
        moments.safetensors  exp_avg.<name>, exp_avg_sq.<name>
        average.safetensors  averaged weights, when the run keeps them
        random.safetensors   torch's generators

Tensors are safetensors and numbers JSON; nothing is pickled. A folder has its final name only when it is complete, so
the newest complete state is found by looking.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from benthic.errors import CheckpointError, RunError
from benthic.files import sync, write_atomic
from benthic.train.disk import publish_folder, remove_folder, write_tensors

FORMAT = 1
_PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of a run's state. `best` and `validation` are the best and the last validation; `corpus` is the
    fingerprint of what the run reads."""

    step: int = 0
    tokens: int = 0
    loader: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""

    def require_continues(self, corpus: str, steps: int) -> None:
        """Raise RunError unless a run of `steps` updates that reads `corpus` can go on from here."""
        if self.corpus != corpus:
            raise RunError(
                f"the corpus has changed since step {self.step} (fingerprint {corpus[:12]}, was {self.corpus[:12]})",
                hint="bring the old text back, or start a new run with --run-folder",
            )
        if self.step > steps:
            raise RunError(
                f"the run has made {self.step} updates already, but steps is {steps}",
                hint=f"resume with --steps {self.step} or more",
            )


@dataclass(frozen=True, slots=True)
class State:
    """One saved state in memory: numbers and named tensors, and where torch's generators were when it was made."""

    progress: Progress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    generators: Mapping[str, Tensor] = field(default_factory=lambda: _generators())


def complete_states(checkpoints: Path) -> list[Path]:
    """Folders of complete states, oldest first."""
    numbered = (path for path in checkpoints.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal())
    return sorted(path for path in numbered if path.is_dir())


def newest_step(checkpoints: Path) -> int:
    """Updates that the newest complete state has made, -1 where there is none."""
    states = complete_states(checkpoints)
    return int(states[-1].name.removeprefix(_PREFIX)) if states else -1


def state_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` updates belongs."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def save_state(checkpoints: Path, state: State, keep: int | None) -> Path:
    """Write `state`, then delete all but the newest `keep`; the folder it is in.

    Raises CapacityError when there is no room and RunError when writing is refused; older states stay as they were.
    """
    step = state.progress.step
    final = state_folder(checkpoints, step)

    def fill(folder: Path) -> None:
        write_tensors(folder / "weights.safetensors", state.weights)
        write_tensors(folder / "moments.safetensors", state.moments)
        if state.average is not None:
            write_tensors(folder / "average.safetensors", state.average)
        write_numbers(folder, state)

    publish_folder(final, f"the training state of step {step}", fill)
    keep_newest(checkpoints, keep)
    return final


def write_numbers(folder: Path, state: State) -> None:
    """What of a state is no weight, the last to be written into its folder."""
    write_tensors(folder / "random.safetensors", state.generators)
    numbers = {"format": FORMAT, "torch": torch.__version__, **asdict(state.progress)}
    write_atomic(folder / "state.json", json.dumps(numbers, indent=2) + "\n")
    sync(folder)


def keep_newest(checkpoints: Path, keep: int | None) -> None:
    """Delete all states but the newest `keep`."""
    if keep is not None:
        for old in complete_states(checkpoints)[:-keep]:
            remove_folder(old)


def read_state(folder: Path, device: torch.device) -> State:
    """Read a state and set torch's generators to it. Raises CheckpointError naming the file that is wrong."""
    average = folder / "average.safetensors"
    return State(
        progress=read_numbers(folder),
        weights=_tensors(folder / "weights.safetensors", device),
        moments=_tensors(folder / "moments.safetensors", device),
        average=_tensors(average, device) if average.exists() else None,
    )


def read_numbers(folder: Path) -> Progress:
    """The numbers of a state, and torch's generators set to it."""
    try:
        numbers = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = numbers.pop("format", None)
        numbers.pop("torch", None)
        progress = _progress(numbers) if found == FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder / "state.json", error) from None
    if progress is None:
        raise CheckpointError(f"{folder} was written in another format than {FORMAT}, the one this version reads")
    try:
        _set_generators(_tensors(folder / "random.safetensors", torch.device("cpu")))
    except (KeyError, RuntimeError, TypeError) as error:
        raise _damaged(folder / "random.safetensors", error) from None
    return progress


def _progress(numbers: dict[str, Any]) -> Progress:
    """Progress whose numbers are numbers and whose parts are objects; TypeError otherwise."""
    progress = Progress(**numbers)
    for name, default in asdict(Progress()).items():
        value = getattr(progress, name)
        if type(value) is not type(default):
            raise TypeError(f"{name} is {value!r}")
    if type(progress.loader.get("position", 0)) is not int:
        raise TypeError(f"loader.position is {progress.loader['position']!r}")
    return progress


def _tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error}",
        hint=f"move {path.parent} away; --resume then continues from the state before it",
    )


def _generators() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

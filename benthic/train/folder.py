"""A run folder: one process at a time, one config, rows that end where the saved state does.

config.yaml  metrics.jsonl  samples.jsonl  routing/  checkpoints/  failures/  model/
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from benthic.config.train import TrainConfig
from benthic.errors import RunError
from benthic.files import write_atomic
from benthic.log import logger
from benthic.train.disk import explained, put_back, sweep

HARMLESS = ("name", "device", "logging", "sampling", "evaluation", "checkpoint", "memory", "parallel")
"""Settings that may differ on resume, by their first word: none of them touches a weight."""

NO_RUN = (".lock", "data")
"""What a folder may hold without a run being in it: text prepared before is used again."""

ROWS = ("metrics.jsonl", "samples.jsonl")


class RunFolder:
    """The paths of a run. Made by `open_run_folder`, which holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.routing = path / "routing"
        self.checkpoints = path / "checkpoints"
        self.failures = path / "failures"
        self.data = path / "data"
        self.model = path / "model"

    @classmethod
    @contextmanager
    def open(cls, path: Path, config: TrainConfig, resume: bool) -> Iterator[Self]:
        """Make or enter `path` and hold it until the end of the block.

        Raises RunError when another process holds it, when it is in use and `resume` is False, when there is nothing
        to resume, and when the run in it had a config that trains differently.
        """
        if resume and not (path / "config.yaml").is_file():
            raise RunError(f"nothing to resume in {path}: it has no config.yaml", hint="leave --resume out")
        with ExitStack() as stack:
            with explained("the run folder", path):
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(path))
                folder = cls._entered(path, config, resume)
            yield folder

    @classmethod
    def _entered(cls, path: Path, config: TrainConfig, resume: bool) -> Self:
        used = [one.name for one in path.iterdir() if one.name not in NO_RUN]
        if used and not resume and not _never_began(path, used):
            raise RunError(
                f"run folder {path} is not empty (it holds {', '.join(sorted(used)[:3])})",
                hint="continue that run with --resume, or start another with --run-folder",
            )
        folder = cls(path)
        if resume:
            refuse_changed_config(TrainConfig.from_yaml(folder.config), config)
        else:
            folder.write_config(config)
        for one in (folder.routing, folder.checkpoints):
            one.mkdir(exist_ok=True)
        for one in (path, folder.checkpoints, folder.routing, folder.data):
            for name in put_back(one):
                logger.info("put back %s, whose replacement was interrupted", name)
            for name in sweep(one):
                logger.info("removed %s, left by an interrupted write", name)
        return folder

    def write_config(self, config: TrainConfig) -> None:
        """State the config the run goes on with."""
        write_atomic(self.config, config.to_yaml())

    def rewind(self, step: int) -> None:
        """Drop rows and expert loads of updates after `step`, and a row cut short by a kill."""
        for name in ROWS:
            path = self.path / name
            if path.exists():
                write_atomic(path, b"".join(_rows_until(path, step)))
        for path in self.routing.glob("loads-*.npz"):
            number = path.stem.removeprefix("loads-")
            if number.isdecimal() and int(number) > step:
                path.unlink()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one JSON object to one of ROWS."""
        path = self.path / name
        with explained(name, path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _rows_until(path: Path, step: int) -> Iterator[bytes]:
    with explained(path.name, path):
        content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if line.endswith(b"\n") and _step(line, f"{path}, line {number}") <= step:
            yield line


def _step(line: bytes, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(
            f"{where} is no row of a run ({type(error).__name__}: {error})",
            hint="mend or remove that line, then run again with --resume; the saved states are intact",
        ) from None


def _never_began(path: Path, used: list[str]) -> bool:
    """Whether a start failed before its first row: nothing is lost when another takes the folder."""
    if not set(used) <= {"config.yaml", "checkpoints", "routing"}:
        return False
    return not any(child for name in used if (path / name).is_dir() for child in (path / name).iterdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # The kernel lets go of it when the process ends, kill -9 included, so a stale lock cannot be left.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 32).decode() or "unknown"
        os.close(handle)
        raise RunError(
            f"run folder {path} is in use by process {holder}", hint="wait for it, or choose another --run-folder"
        ) from None
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def refuse_changed_config(before: TrainConfig, after: TrainConfig) -> None:
    """Raise RunError naming each setting that would make the resumed run train differently.

    `steps` may grow or shrink when no schedule counts in shares of the run.
    """
    old, new = _leaves(before.model_dump(mode="json")), _leaves(after.model_dump(mode="json"))
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    changed = {name for name in changed if name.split(".")[0] not in HARMLESS}
    if "share" not in {value for name, value in old.items() if name.endswith(".unit")}:
        changed.discard("steps")
    if changed:
        listed = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in sorted(changed))
        raise RunError(
            f"cannot resume with a changed config: {listed}",
            hint="resume with the settings in the run's config.yaml, or start a new run with --run-folder",
        )


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list) and any(isinstance(one, dict) for one in tree):
        children = enumerate(tree)
    else:
        return {path: tree}
    found: dict[str, Any] = {}
    for name, child in children:
        found |= _leaves(child, f"{path}.{name}" if path else str(name))
    return found

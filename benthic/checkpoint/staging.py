"""Files appear in a folder all at once, or not at all.

A new folder is written beside its place and renamed. In an existing folder the files are written and synced inside a
hidden subfolder, which is renamed to `.incoming` (from here the new checkpoint is complete and wins), moved file by
file into place, the index last, and what it replaces is removed. Killed before the rename, the old checkpoint is
untouched; killed after it, the next save finishes the move, and until then a reader says what happened.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from benthic.checkpoint.folder import INCOMING, INDEX, WEIGHTS, checkpoint_files
from benthic.errors import CapacityError, CheckpointError
from benthic.files import sync, write_failure


@contextmanager
def staged(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder to write a whole checkpoint of about `num_bytes` into; on leaving it takes its place.

    When the body raises, nothing stays and the folder is as it was. Raises CapacityError when the disk is full (before
    writing, where that can be foreseen) and CheckpointError when the folder cannot be written.
    """
    with storage_errors(folder):
        folder = folder.resolve()
        is_update = folder.is_dir()
        parent = folder if is_update else folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        if (folder / INCOMING).is_dir():
            _move_into_place(folder)
        prefix = f".{folder.name}.partial-{socket.gethostname()}-"
        _remove_abandoned(parent, prefix)
        _refuse_full_disk(parent, num_bytes)
        stage = parent / f"{prefix}{secrets.token_hex(4)}"
        stage.mkdir()
        lock = os.open(stage, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with storage_errors(folder):
            yield stage
            sync(stage)
            if is_update:
                os.rename(stage, folder / INCOMING)
                _move_into_place(folder)
            else:
                os.rename(stage, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors a user can act on."""
    try:
        yield
    except OSError as error:
        raise write_failure(folder, error, CheckpointError) from error


def _move_into_place(folder: Path) -> None:
    """Move what `.incoming` still holds; also finishes a move that was cut off.

    The file that says which weights there are (index or single file) goes last, when the stale ones are gone.
    """
    incoming = folder / INCOMING
    last = next((name for name in (INDEX, WEIGHTS) if (incoming / name).is_file()), None)
    for path in sorted(incoming.iterdir()):
        if path.name != last:
            os.replace(path, folder / path.name)
    if last:
        for name in checkpoint_files(folder) - _current_files(incoming / last):
            (folder / name).unlink()
        os.replace(incoming / last, folder / last)
    sync(folder)
    incoming.rmdir()


def _current_files(last: Path) -> set[str]:
    if last.name == WEIGHTS:
        return {WEIGHTS}
    return {INDEX, *json.loads(last.read_text(encoding="utf-8"))["weight_map"].values()}


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed processes of this machine left behind.

    Whoever is writing holds a lock on its folder, which the kernel lets go of when the process ends. Process ids tell
    less: a container gives the same one to each process it starts.
    """
    for path in parent.glob(f"{escape(prefix)}*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def _refuse_full_disk(parent: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise CapacityError(
            f"{parent} has {free / 2**30:.2f} GiB free; the checkpoint needs {num_bytes / 2**30:.2f} GiB",
            hint="free some space, save elsewhere, or use a smaller weight format (fp8 takes half of bf16)",
        )

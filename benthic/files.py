"""Files that are whole or absent: a temporary name in the same folder, fsync, then one rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from benthic.errors import BenthicError, CapacityError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(path: Path, error: OSError, kind: type[BenthicError] = RunError) -> BenthicError:
    """The clear error for a write to `path` that the operating system refused."""
    if error.errno in _FULL:
        return CapacityError(
            f"cannot write {path}: {error.strerror}", hint="free some space or choose another folder; nothing was left"
        )
    return kind(f"cannot write {path}: {error.strerror or error}", hint="choose a folder that you may write to")


@contextmanager
def atomic_file(path: Path, kind: type[BenthicError] = RunError) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends well; parents are made.

    A full disk raises CapacityError, any other refusal of the operating system `kind`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise write_failure(path, error, kind) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomic(path: Path, content: str | bytes, kind: type[BenthicError] = RunError) -> None:
    """Write `content` (text as UTF-8) under `path`, whole or not at all."""
    with atomic_file(path, kind) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Folders that are whole or absent, whatever is killed or full, and errors that say what was being written.

A folder is filled under a temporary name beside its final one, pushed to the disk, and renamed (single files:
benthic/files.py).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from benthic.errors import BenthicError, CapacityError, RunError
from benthic.files import sync

PARTIAL = ".partial"
"""Ending of temporary names; whoever holds the run's lock may delete what bears it."""
REPLACED = ".replaced"
"""Ending of a whole folder's name while a newer one takes its place: all there is until the new one has its name."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn the operating system's refusals inside into CapacityError or RunError that say what was being written."""
    try:
        yield
    except OSError as error:
        raise _explanation(error.errno, str(error), what, path) from None
    except SafetensorError as error:
        # safetensors hands on the system's error as text alone, "(os error 28)" or "Os { code: 28, ..." by version.
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        raise _explanation(int(found[1]) if found else None, str(error), what, path) from None


def _explanation(code: int | None, text: str, what: str, path: Path) -> BenthicError:
    if code in _NO_SPACE:
        free = f"{_free_bytes(path) / 2**20:,.0f} MiB free"
        return CapacityError(
            f"no room to write {what} at {path} ({free})",
            hint="free some space, then run again with --resume; everything saved before is intact",
        )
    if code in _NO_PERMISSION:
        return RunError(
            f"not allowed to write {what} at {path}", hint="choose a folder you may write to with --run-folder"
        )
    return RunError(f"cannot write {what} at {path}: {text}")


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file inside a folder that is not published yet."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def publish_folder(final: Path, what: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, then rename it to `final`, in place of what stood there.

    What stood there is moved aside and deleted last, so that a whole folder is on the disk at every moment.
    """
    partial, aside = partial_name(final), _aside(final)
    with explained(what, final):
        put_back(final.parent)
        remove_folder(partial)
        try:
            partial.mkdir(parents=True)
            fill(partial)
            sync(partial)
            if final.exists():
                remove_folder(aside)
                os.replace(final, aside)
            os.replace(partial, final)
            sync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            put_back(final.parent)
            raise
        remove_folder(aside)


def partial_name(final: Path) -> Path:
    """Where `publish_folder` lets a folder be filled."""
    return final.with_name(f".{final.name}{PARTIAL}")


def put_back(folder: Path) -> list[str]:
    """Rename in `folder` what was moved aside for a newer one that never got its name; the names they have again."""
    missing = [final for final in _replaced(folder) if not final.exists()]
    for final in missing:
        os.replace(_aside(final), final)
    return [final.name for final in missing]


def _replaced(folder: Path) -> list[Path]:
    """Final names of the folders moved aside in `folder`."""
    return [folder / path.name[1 : -len(REPLACED)] for path in sorted(folder.glob(f".*{REPLACED}"))]


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}{REPLACED}")


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill half-way leaves it under a temporary name, never a part of it under its own."""
    if not folder.exists():
        return
    doomed = folder if folder.name.endswith(PARTIAL) else folder.with_name(f".{folder.name}.old{PARTIAL}")
    if doomed is not folder:
        os.replace(folder, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> list[str]:
    """Delete what interrupted writes left in `folder` (benthic/files.py writes under `.NAME.PID.tmp`); their names.

    A folder moved aside is deleted only where the one that replaced it stands.
    """
    replaced = [_aside(final) for final in _replaced(folder) if final.exists()]
    left = sorted([*folder.glob(f".*{PARTIAL}"), *folder.glob(".*.tmp"), *replaced])
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in left]

"""When a rank fails, the others fail too: they find a connection closed. One of them says why, and says which rank.

Ranks leave a word in the store that brought them together, which torchrun keeps and which outlives each of them. The
first to leave speaks; those that come after raise PeerError, which the command line does not print. A rank that leaves
no word within a few seconds was killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from benthic.errors import BenthicError, PeerError, RunError

SECONDS = 5.0
"""How long a rank that has lost touch waits for the last words of the others."""


@contextmanager
def one_speaks(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Errors inside become those of a run: on the rank that failed first its own, on the others PeerError; a rank that
    is gone is named by RunError."""
    try:
        yield
    except (BenthicError, RuntimeError) as error:
        try:
            first = _leave(store, rank)
            lost = [] if isinstance(error, BenthicError) else _without_a_word(store, size)
        except (RuntimeError, OSError):
            raise RunError(
                f"rank {rank} has lost both the others and the store that torchrun keeps: {_line(error)}",
                hint="what ended torchrun, or its machine, ended the run; continue with --resume",
            ) from error
        if not first:
            raise PeerError(f"rank {rank} stopped because another did: {_line(error)}") from error
        if lost:
            raise _gone(lost, rank) from error
        raise


def _leave(store: dist.Store, rank: int) -> bool:
    """Leave a word; whether this rank is the first to."""
    store.set(f"left/{rank}", "1")
    return store.add("left", 1) == 1


def _without_a_word(store: dist.Store, size: int) -> list[int]:
    ends = time.monotonic() + SECONDS
    missing = list(range(size))
    while missing and time.monotonic() < ends:
        missing = [rank for rank in missing if not store.check([f"left/{rank}"])]
        time.sleep(0.05)
    return missing


def _gone(lost: list[int], rank: int) -> RunError:
    named = ", ".join(map(str, lost))
    return RunError(
        f"rank{'s' if len(lost) > 1 else ''} {named} of the run ended without a word (killed, or out of memory); "
        f"rank {rank} noticed, and all stop",
        hint="torchrun tells how it ended; torchrun --max-restarts N goes on from the last saved state by itself, "
        "--resume by hand",
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

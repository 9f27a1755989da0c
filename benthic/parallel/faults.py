"""When a rank fails, the others fail too: they find a connection closed. One of them says why, and says which rank.

Ranks leave a word in the store that brought them together, which torchrun keeps and which outlives each of them. The
first to leave speaks; those that come after raise PeerError, which the command line does not print. A rank that was
told of another's failure raises PeerError itself and lets that one speak. A rank that leaves no word within a few
seconds, and gives no sign of life either, was killed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from benthic.errors import BenthicError, PeerError, RunError
from benthic.parallel.pulse import counts

SECONDS = 5.0
"""How long a rank that has lost touch waits for the last words of the others."""

_TALKING = re.compile(r"gloo|nccl|monitoredbarrier|connection (?:closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What errors of collectives say: gloo's are plain RuntimeErrors."""


@contextmanager
def one_speaks(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Errors inside become those of a run: on the rank that failed first its own, on the others PeerError; a rank that
    is gone is named by RunError."""
    try:
        yield
    except PeerError:
        with suppress(RuntimeError, OSError):
            store.set(_word(rank), "1")
        raise
    except Exception as error:
        try:
            first = _leave(store, rank)
            lost = _without_a_word(store, size) if _lost_touch(error) else []
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


def _lost_touch(error: Exception) -> bool:
    """Whether what failed was talking to the others. The rank's own faults, memory that ran out among them, are not
    to be blamed on ranks that are well and wait."""
    if isinstance(error, BenthicError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or _TALKING.search(str(error)) is not None


def _leave(store: dist.Store, rank: int) -> bool:
    """Leave a word; whether this rank is the first to."""
    store.set(_word(rank), "1")
    return store.add("left", 1) == 1


def _word(rank: int) -> str:
    return f"left/{rank}"


def _without_a_word(store: dist.Store, size: int) -> list[int]:
    ends = time.monotonic() + SECONDS
    missing = list(range(size))
    before = counts(store, missing)
    while missing and time.monotonic() < ends:
        missing = [rank for rank in missing if not store.check([_word(rank)])]
        time.sleep(0.05)
    after = counts(store, missing)
    # Who counts on is at work, and has only not come to a collective yet. A dead rank's last count may come late.
    return [rank for rank in missing if after.get(rank, 0) <= before.get(rank, 0) + 1]


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

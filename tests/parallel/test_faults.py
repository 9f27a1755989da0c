"""Who speaks when ranks fail, on a store of one process: the rank at fault, or the first that noticed a dead one."""

import pytest
import torch.distributed as dist

from benthic.errors import PeerError, RunError
from benthic.parallel import faults
from benthic.parallel.faults import one_speaks

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"


def leave(store: dist.Store, rank: int, error: Exception, size: int = 2) -> None:
    with one_speaks(store, rank, size):
        raise error


def test_a_rank_that_runs_out_of_memory_blames_no_rank_that_waits_for_it():
    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        leave(dist.HashStore(), 0, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not isinstance(raised.value, RunError)


def test_a_fault_of_any_kind_is_a_last_word():
    store = dist.HashStore()
    with pytest.raises(TypeError, match="a fault of the program"):
        leave(store, 1, TypeError("a fault of the program"))
    with pytest.raises(PeerError, match=r"rank 0 stopped because another did: \[gloo"):
        leave(store, 0, RuntimeError(CLOSED))


def test_a_rank_that_was_told_lets_the_one_at_fault_speak_though_it_leaves_first():
    store = dist.HashStore()
    with pytest.raises(PeerError, match="rank 0 could not use the run folder"):
        leave(store, 1, PeerError("rank 0 could not use the run folder"))
    with pytest.raises(RunError, match="run folder is not empty"):
        leave(store, 0, RunError("run folder is not empty"))


def test_a_rank_that_left_no_word_is_named(monkeypatch):
    monkeypatch.setattr(faults, "SECONDS", 0.2)
    with pytest.raises(RunError) as raised:
        leave(dist.HashStore(), 0, RuntimeError(CLOSED), size=3)
    assert str(raised.value) == (
        "ranks 1, 2 of the run ended without a word (killed, or out of memory); rank 0 noticed, and all stop\n"
        "hint: torchrun tells how it ended; torchrun --max-restarts N goes on from the last saved state by itself, "
        "--resume by hand"
    )

"""Silent ranks are named once, and again when they are back; ranks that count on are not."""

import logging
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from benthic.config.parallel import ParallelConfig
from benthic.log import logger
from benthic.parallel import faults, pulse
from benthic.parallel.pulse import Listener, beating, counts
from benthic.parallel.world import joined
from tests.parallel.processes import on_ranks
from tests.train.small import small_model


@pytest.fixture
def told():
    """What is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_silent_rank_is_reported_once_and_when_it_is_back(told):
    listener = Listener(3)
    for second in range(100):
        listener.hear({0: second, 1: min(second, 10), 2: second // 20} | ({1: second} if second > 60 else {}), second)
    assert told == [
        "no sign of life of rank 1 for 30 s: stopped, starved of processor time, or cut off from the network; "
        "the others wait",
        "rank 1 is back after 51 s of silence",
    ]


def test_a_rank_that_never_began_is_silent(told):
    listener = Listener(3)
    for second in range(40):
        listener.hear({0: second}, second)
    assert len(told) == 1
    assert told[0].startswith("no sign of life of ranks 1, 2 for 30 s")


def test_a_rank_counts_until_it_leaves(monkeypatch):
    monkeypatch.setattr(pulse, "EVERY", 0.01)
    store = dist.HashStore()
    assert counts(store, [0, 1]) == {}
    with beating(store, 1, 2):
        before = wait_for_count(store, 1)
        assert wait_for_count(store, before[1] + 1)[1] > before[1]
    last = counts(store, [0, 1])
    time.sleep(0.05)
    assert counts(store, [0, 1]) == last


def wait_for_count(store: dist.Store, least: int) -> dict[int, int]:
    ends = time.monotonic() + 10
    while (found := counts(store, [0, 1])).get(1, 0) < least:
        assert time.monotonic() < ends
        time.sleep(0.005)
    return found


def test_a_rank_that_is_at_work_is_not_called_dead(monkeypatch):
    monkeypatch.setattr(pulse, "EVERY", 0.01)
    monkeypatch.setattr(faults, "SECONDS", 0.5)
    store = dist.HashStore()
    with beating(store, 1, 3):
        wait_for_count(store, 1)
        assert faults._without_a_word(store, 3) == [0, 2]


def stopped_for_a_while() -> list[str]:
    """Rank 0 stops rank 1, which it waits for, and lets it go on when its silence has been reported."""
    pulse.EVERY, pulse.SILENCE = 0.1, 1.0
    lines: list[str] = []
    logger.warning = lambda text, *values: lines.append(text % values)
    with joined(ParallelConfig(shard=2), small_model(), torch.device("cpu")) as world:
        pid = world.total(0 if world.leads else os.getpid())
        world.wait_for_all()
        if world.leads:
            os.kill(pid, signal.SIGSTOP)
            wait_for_lines(lines, 1)
            os.kill(pid, signal.SIGCONT)
            wait_for_lines(lines, 2)
        world.wait_for_all()
    return lines


def wait_for_lines(lines: list[str], count: int) -> None:
    ends = time.monotonic() + 30
    while len(lines) < count and time.monotonic() < ends:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_rank_is_named_while_the_others_wait():
    lines, others = on_ranks(2, stopped_for_a_while)
    assert lines[0].startswith("no sign of life of rank 1 for 1 s")
    assert lines[1].startswith("rank 1 is back after")
    assert others == []

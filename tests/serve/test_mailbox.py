"""What waits for a reader who is stuck is bounded by its bytes; a burst for one who reads is not."""

from __future__ import annotations

import asyncio

import pytest

from benthic.serve import mailbox
from benthic.serve.mailbox import Mailbox
from benthic.serve.messages import Delta, Finish, PromptLogprobs
from benthic.serve.refusal import Refusal

PIECE = Delta(0, 0, [5], "x", [-0.5])
MOST = 10 * PIECE.bytes_held


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as the mailbox sees them; to be set."""
    now = [100.0]
    monkeypatch.setattr(mailbox.time, "monotonic", lambda: now[0])
    return now


async def taken(box, count):
    """A reader who has taken `count` deltas, and is busy with the last."""
    reader = box.deltas()
    for _ in range(count):
        await anext(reader)
    return reader


def test_all_that_comes_is_read_in_order():
    async def talk():
        box, last = Mailbox(2, MOST), [PIECE] * 3 + [Delta(0, index, [], "", finish=Finish("stop")) for index in (1, 0)]
        for delta in last:
            asyncio.get_running_loop().call_soon(box.put, delta)
        return [delta async for delta in box.deltas()] == last

    assert asyncio.run(talk())


def test_what_waits_for_a_reader_who_is_stuck_is_bounded_and_then_thrown_away(clock):
    async def talk():
        failures = []
        box = Mailbox(1, MOST, lambda: failures.append(clock[0]))
        box.put(PIECE)
        reader = await taken(box, 1)
        clock[0] += 30
        for _ in range(10):
            box.put(PIECE)
        assert box.failure is None
        for _ in range(1000):
            box.put(PIECE)
        assert failures == [130.0]
        assert not box._deltas
        with pytest.raises(Refusal, match=f"more than {MOST} bytes unread") as raised:
            await anext(reader)
        assert raised.value.status == 408

    asyncio.run(talk())


def test_a_burst_is_no_fault_of_a_reader_who_was_busy_for_a_moment(clock):
    async def talk():
        box = Mailbox(1, MOST)
        for _ in range(1000):
            box.put(PIECE)
        reader = await taken(box, 1)
        clock[0] += mailbox.PATIENCE
        box.put(PIECE)
        for _ in range(1000):
            clock[0] += mailbox.PATIENCE
            await anext(reader)
            box.put(PIECE)
        assert box.failure is None

    asyncio.run(talk())


def test_as_much_may_wait_as_the_reader_is_busy_with(clock):
    async def talk():
        size = 100
        prompt = PromptLogprobs([-1.0] * size, [{token: -1.0 for token in range(20)}] * size)
        box = Mailbox(1, MOST)
        box.put(Delta(0, 0, [5], "x", [-0.5], None, prompt))
        await taken(box, 1)
        clock[0] += 10
        for _ in range(100):
            box.put(PIECE)
        assert box.failure is None
        for _ in range(1000):
            box.put(PIECE)
        assert box.failure is not None

    asyncio.run(talk())


def test_a_failure_comes_before_what_was_not_read_yet():
    async def talk():
        box = Mailbox(1, MOST)
        box.put(PIECE)
        box.fail(Refusal(504, "late"))
        box.fail(Refusal(503, "gone"))
        with pytest.raises(Refusal, match="late"):
            await anext(box.deltas())

    asyncio.run(talk())

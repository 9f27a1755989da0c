"""Blocks are free, cached or referenced, and what is shared has the same beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.inference.blocks import BlockPool
from benthic.inference.prefix import salted


def block_of(salt, *tokens):
    """The first block of a sequence."""
    return salted(salt).followed_by(tokens)


def test_the_longest_unused_block_is_given_up_first_and_ends_before_beginnings():
    pool = BlockPool(4)
    prefixes = [block_of("", n) for n in range(4)]
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for block, prefix in zip(first + second, prefixes, strict=True):
        pool.publish(block, prefix)
    pool.release(first)
    pool.release(second)
    assert pool.available == 4
    assert [pool.take() for _ in range(4)] == [first[1], first[0], second[1], second[0]]
    assert pool.find(prefixes[0]) is None
    pool.check([first, second])


def test_who_fills_the_cache_gives_up_blocks_of_his_own():
    pool = BlockPool(8)
    names = {"quiet": [block_of("q", n) for n in range(3)], "loud": [block_of("l", n) for n in range(40)]}
    for owner, prefixes in names.items():
        for prefix in prefixes:
            block = pool.take()
            pool.publish(block, prefix, owner)
            pool.release([block])
            pool.check()
    assert all(pool.find(prefix) is not None for prefix in names["quiet"])
    assert sum(pool.find(prefix) is not None for prefix in names["loud"]) == 5
    assert [pool.find(prefix) is not None for prefix in names["loud"][-5:]] == [True] * 5


def test_a_found_block_counts_its_holders():
    pool = BlockPool(2)
    block, prefix = pool.take(), block_of("", 7)
    pool.publish(block, prefix)
    pool.release([block])
    assert pool.is_cached(block)
    for _ in range(2):
        pool.share(pool.find(prefix))
    pool.check([[block], [block]])
    assert pool.referenced == 1
    pool.release([block])
    pool.check([[block]])
    pool.release([block])
    pool.forget()
    assert pool.find(prefix) is None
    pool.check()


def test_a_check_finds_what_was_lost_or_held_twice():
    pool = BlockPool(3)
    block = pool.take()
    with pytest.raises(AssertionError, match="references are"):
        pool.check()
    pool._free.append(block)
    with pytest.raises(AssertionError, match="two states"):
        pool.check([[block]])


@given(st.lists(st.tuples(st.sampled_from("taps r"), st.integers(0, 9), st.integers(0, 5)), max_size=60))
def test_no_order_of_calls_loses_a_block(calls):
    pool, held = BlockPool(5), [[] for _ in range(3)]
    for call, number, number_of_prefix in calls:
        mine, prefix = held[number % 3], block_of("", number_of_prefix)
        found = pool.find(prefix)
        if call == "t" and pool.available:
            mine.append(pool.take())
        elif call == "a" and found is not None:
            pool.share(found)
            mine.append(found)
        elif call == "p" and mine:
            pool.publish(mine[-1], prefix, "xy"[number % 2])
        elif call == "r":
            pool.release(mine)
            mine.clear()
        elif call == "s" and number == 9:
            pool.forget()
        pool.check(held)

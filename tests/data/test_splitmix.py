"""The generator under everything that is drawn."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benthic.data.splitmix import Draws, key, mix, mix_array


def test_the_published_stream_of_seed_1234567():
    """The first outputs of SplitMix64 as its reference implementation prints them."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(mix(state))
        state += 0x9E3779B97F4A7C15
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_arrays_are_mixed_like_integers(values):
    assert mix_array(np.array(values, dtype=np.uint64)).tolist() == [mix(one) for one in values]


def test_keys_know_the_order_of_their_numbers():
    assert len({key(1, 2), key(2, 1), key(1, 2, 0), key(12)}) == 4


@given(st.integers(0, 2**64), st.integers(1, 50))
def test_draws_are_in_range_and_repeat(seed, limit):
    first, second = Draws(seed, 7), Draws(seed, 7)
    drawn = [first.below(limit) for _ in range(20)]
    assert drawn == [second.below(limit) for _ in range(20)]
    assert all(0 <= one < limit for one in drawn)


def test_draws_are_about_uniform():
    draws = Draws(0)
    counts = np.bincount([draws.below(10) for _ in range(10_000)], minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_shuffling_keeps_everything():
    assert sorted(Draws(3).shuffled(range(50))) == list(range(50))
    assert Draws(3).shuffled(range(50)) != list(range(50))

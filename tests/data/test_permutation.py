"""A shuffled order computed, not stored."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benthic.data.permutation import permuted


@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 5))
def test_it_is_a_bijection_of_any_size(size, seed, epoch):
    assert sorted(permuted(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@given(st.integers(1, 2**48), st.integers(0, 2**63), st.data())
def test_large_sizes_stay_inside(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    found = permuted(index, size, seed)
    assert ((found >= 0) & (found < size)).all()


def test_seed_and_epoch_change_the_order():
    orders = [permuted(np.arange(100), 100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_looks_random():
    order = permuted(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_asking_one_by_one_is_the_same_as_asking_at_once():
    whole = permuted(np.arange(37), 37, 5)
    assert [int(permuted(np.array([one]), 37, 5)[0]) for one in range(37)] == whole.tolist()

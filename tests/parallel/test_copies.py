"""Copies of popular experts: everything has a place, and nobody has more to do than without copies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.parallel.copies import Copies, place_experts


@st.composite
def layouts(draw):
    loads = draw(st.lists(st.floats(0, 1000), min_size=1, max_size=20))
    ranks = draw(st.integers(1, 6))
    return loads, ranks, draw(st.integers(-(-len(loads) // ranks), len(loads)))


def burdens(loads, held):
    copies = [sum(expert in one for one in held) for expert in range(len(loads))]
    return [sum(loads[expert] / copies[expert] for expert in one) for one in held]


@given(layouts())
def test_every_place_is_taken_and_no_rank_holds_an_expert_twice(layout):
    loads, ranks, places = layout
    held = place_experts(loads, ranks, places)
    assert [len(one) for one in held] == [places] * ranks
    assert all(len(set(one)) == places for one in held)
    assert {expert for one in held for expert in one} == set(range(len(loads)))


def test_a_popular_expert_gets_the_copies_and_ranks_come_out_even():
    loads = [900.0, 100, 100, 100, 100, 100, 100, 100]
    alone, copied = place_experts(loads, 4, 2), place_experts(loads, 4, 3)
    assert max(burdens(loads, alone)) == 1000
    assert sum(0 in one for one in copied) == 4
    assert max(burdens(loads, copied)) == pytest.approx(425)
    assert sum(burdens(loads, copied)) == pytest.approx(sum(loads))


def test_a_choice_goes_to_a_copy_at_home_or_to_the_others_in_turn():
    held = ((0, 1), (0, 2), (3, 2))
    experts = torch.tensor([[0, 3], [2, 1], [0, 2]])
    assert Copies(held, 0, torch.device("cpu")).of(experts).tolist() == [[0, 4], [5, 1], [0, 3]]
    assert Copies(held, 2, torch.device("cpu")).of(experts).tolist() == [[0, 4], [5, 1], [0, 5]]


@pytest.mark.parametrize("places", [1, 5])
def test_places_that_do_not_fit_are_refused(places):
    with pytest.raises(ConfigError, match=f"3 ranks with places for {places} experts each cannot hold 4 experts"):
        place_experts([1.0] * 4, 3, places)

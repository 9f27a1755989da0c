"""Sums that explain themselves."""

from __future__ import annotations

from benthic.plan.breakdown import Breakdown, Term, breakdown


def test_a_breakdown_adds_up_by_part_and_leaves_out_what_is_nothing():
    terms = (Term("a", "x", "1", 1.0), Term("b", "y", "2", 2.0), Term("a", "z", "3", 3.0), Term("c", "w", "0", 0.0))
    found = breakdown("bytes", terms, ["assumed"])
    assert found == Breakdown("bytes", terms[:3], ("assumed",))
    assert (found.total, found.by_part) == (6.0, {"a": 4.0, "b": 2.0})

"""The ledger keeps the highest moment, whatever follows."""

from __future__ import annotations

from benthic.plan.breakdown import Term
from benthic.plan.ledger import Ledger


def test_the_highest_moment_is_kept_with_its_workspace():
    ledger = Ledger()
    ledger.hold("weights", "weights", 100, "10 x 10 B")
    ledger.hold("activations", "x", 40)
    ledger.moment("first", scratch_rows=20)
    ledger.hold("activations", "x", -40)
    ledger.moment("second", scratch_rows=30)
    assert ledger.highest == "first"
    assert ledger.terms(tokens=4) == (
        Term("weights", "weights", "10 x 10 B", 100),
        Term("activations", "x", "10 B a token x 4 tokens", 40),
        Term("workspace", "scratch rows", "5 B a token x 4 tokens", 20),
    )

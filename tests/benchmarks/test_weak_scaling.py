"""The scaling benchmark on gloo: the same updates, timed, with the exchange beside them."""

import pytest

from benchmarks.train_arms import Arm
from benchmarks.weak_scaling import measure
from tests.parallel.processes import on_ranks


def test_updates_of_two_ranks_are_timed_and_the_exchange_beside_them():
    arm = Arm(model="tiny", compute="float32", batch=2, sequence_length=32, warm_up=2, steps=3)
    first, second = on_ranks(2, measure, arm, "fsdp=2,ep=2", "cpu")
    assert first["loss"] == pytest.approx(second["loss"])
    assert first["loss"] < 9
    assert first["tokens_per_second"] > 0
    assert (
        first["exchange"]["bytes_away"] == 2 * 32 * 2 * 192 * 2 / 2
    )  # tokens, experts of each, width, bytes; half stays
    assert first["exchange"]["gigabytes_per_second"] > 0

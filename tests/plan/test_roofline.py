"""The roofline: the slower of computing and moving, at the device's own rates."""

import pytest

from benthic.plan.devices import find_device
from benthic.plan.operations import Operation
from benthic.plan.roofline import roofline, time_operation, total_seconds

H200 = find_device("h200")


def operation(flops, moved, work="matmul", count=1):
    return Operation("o", "attention", work, "bf16", count, flops, moved, 0.0)


def test_work_above_the_ridge_is_bound_by_compute():
    timed = time_operation(operation(783e12, 1.0), H200)
    assert timed.bound == "compute"
    assert timed.seconds == pytest.approx(1.0)


def test_work_below_the_ridge_is_bound_by_memory():
    timed = time_operation(operation(1.0, 4.22e12, count=2), H200)
    assert timed.bound == "memory"
    assert timed.seconds == pytest.approx(2.0)


def test_what_only_moves_bytes_ignores_its_flops():
    timed = time_operation(operation(1e18, 4.22e9, work="memory"), H200)
    assert timed.seconds == pytest.approx(1e-3)
    assert timed.rate is None


def test_operations_follow_one_another():
    timed = roofline([operation(783e12, 1.0), operation(1.0, 4.22e12)], H200)
    assert total_seconds(timed) == pytest.approx(2.0)

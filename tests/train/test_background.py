"""Saving beside training: what is written is the state as it was, and errors come out where they are waited for."""

import threading

import pytest
import torch

from benthic.errors import CapacityError
from benthic.train.background import Background, aside
from benthic.train.run import run
from benthic.train.state import Progress, State
from tests.train.small import small_run
from tests.train.test_run import assert_same_end


def test_a_copy_keeps_the_numbers_of_its_moment():
    weight = torch.ones(3)
    copy = aside(State(Progress(), {"w": weight}, {"exp_avg.w": weight}, None))
    weight.zero_()
    assert copy.weights["w"].tolist() == copy.moments["exp_avg.w"].tolist() == [1, 1, 1]


def test_work_runs_one_after_another_and_its_error_is_raised_by_the_next():
    background, done, go = Background(), [], threading.Event()

    def fail() -> None:
        go.wait()
        done.append("first")
        raise CapacityError("no room")

    background.begin(fail)
    go.set()
    with pytest.raises(CapacityError, match="no room"):
        background.begin(lambda: done.append("second"))
    background.begin(lambda: done.append("third"))
    background.finish()
    assert done == ["first", "third"]


def test_a_run_that_saves_beside_training_ends_as_one_that_waits(tmp_path):
    settings = {"every": 1, "keep": 2}
    for name, asynchronous in (("waits", False), ("beside", True)):
        run(small_run(checkpoint=settings | {"asynchronous": asynchronous}), tmp_path / name)
    assert_same_end(tmp_path / "waits", tmp_path / "beside")

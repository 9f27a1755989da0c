"""The scaling benchmark on gloo: the same updates under every layout, timed, with the exchange beside them; and what is
concluded from them."""

import copy

import pytest

from benchmarks import weak_scaling_arm
from benchmarks.train_arms import Arm
from benchmarks.weak_scaling import PEER, conclusions, disagreement, table
from tests.parallel.processes import on_ranks

ARM = Arm(model="tiny", compute="float32", batch=2, sequence_length=32, warm_up=2, steps=3)


@pytest.fixture(scope="module")
def measured():
    (alone,) = on_ranks(1, weak_scaling_arm.measure, ARM, "", 2, "cpu")
    first, second = on_ranks(2, weak_scaling_arm.measure, ARM, "fsdp=2,ep=2", 2, "cpu")
    return alone, first, second


def test_updates_of_two_ranks_are_those_of_one_and_timed(measured):
    alone, first, second = measured
    assert first["compared"] == second["compared"]
    for one, other in zip(alone["compared"], first["compared"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
        assert other["loads"] == one["loads"]
    assert first["tokens_per_second"] > 0
    assert len(first["step_seconds"]["all"]) == 3
    tokens, width, size = 2 * 32, 192, 2
    assert first["exchange"]["bytes_away"] == tokens * width * size  # as many again stay
    assert first["exchange"]["gigabytes_per_second"] > 0


def test_a_gradient_that_was_averaged_or_a_lost_token_is_told(measured):
    alone, spread, _ = measured
    assert disagreement(alone, spread, "bfloat16") is None
    wrong = copy.deepcopy(spread)
    wrong["compared"][1]["gradient_norm"] /= 2
    assert "gradient_norm of update 2" in str(disagreement(alone, wrong, "bfloat16"))
    wrong = copy.deepcopy(spread)
    wrong["compared"][0]["loads"][0][0] -= 1
    assert "choices of update 1" in str(disagreement(alone, wrong, "float8"))


def test_efficiency_is_told_of_layouts_that_agree_with_one_gpu(measured):
    alone, spread, _ = measured
    arms = {
        "bf16 alone": alone | {"tokens_per_second": 100.0},
        "bf16 fsdp=2,ep=2": spread | {"tokens_per_second": 190.0},
        "bf16 dp=2": spread | {"tokens_per_second": 180.0, "compared": [{"loss": 0.0}, *alone["compared"][1:]]},
        PEER: {"tokens_per_second": 95.0},
    }
    found = conclusions(arms)
    assert found["efficiency"] == {"bf16 fsdp=2,ep=2": 0.95}
    assert list(found["disagreements"]) == ["bf16 dp=2"]
    assert found["times_torchtitan"] == 2.0
    for row in arms.values():
        if "exchange" in row:
            row["exchange"] |= {"share_of_nvlink": 0.5, "copy_gigabytes_per_second": 300.0}
    lines = table({"arms": arms} | found).splitlines()
    assert "efficiency 0.950" in lines[1]
    assert lines[-1] == "bf16 fsdp=2,ep=2 is 2.00 times as fast as torchtitan fsdp=2,ep=2"

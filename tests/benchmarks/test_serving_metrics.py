"""The figures of `benthic bench serve`, worked out by hand from vLLM's definitions."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.serve import Workload, arrivals, prompts
from benchmarks.serving_metrics import Timed, figures
from benthic.errors import ConfigError

REQUESTS = [
    # Four tokens in three chunks: 100 ms to the first, then 30 and 60 ms; (190 - 100) / 3 = 30 ms a token.
    Timed(ttft=0.1, latency=0.19, itl=[0.03, 0.06], prompt_tokens=10, output_tokens=4),
    # One token: no TPOT in the mean, but one of 0 for the goodput.
    Timed(ttft=0.3, latency=0.3, itl=[], prompt_tokens=20, output_tokens=1),
    # 200 ms, then three times 20 ms; (260 - 200) / 2 = 30 ms, since two tokens came behind the first.
    Timed(ttft=0.2, latency=0.26, itl=[0.02, 0.02, 0.02], prompt_tokens=30, output_tokens=3),
    Timed(ttft=0.001, latency=0.002, itl=[0.001], prompt_tokens=40, output_tokens=2, error="429: full"),
]


def test_figures_are_those_worked_out_by_hand():
    found = figures(REQUESTS, 2.0, {"ttft": 250.0, "tpot": 30.5})
    assert (found["completed"], found["failed"], found["errors"]) == (3, 1, {"429: full": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (60, 8)
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 4.0
    assert found["total_token_throughput"] == 34.0
    assert found["request_goodput"] == 1.0  # the first and the third
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_ttft_ms"] == pytest.approx(200)
    assert found["p90_ttft_ms"] == pytest.approx(280)  # linear between 200 and 300
    assert found["p99_ttft_ms"] == pytest.approx(298)
    assert found["std_ttft_ms"] == pytest.approx((2 / 3) ** 0.5 * 100)  # of the population
    assert found["mean_tpot_ms"] == pytest.approx(30)
    assert found["mean_itl_ms"] == pytest.approx(30)
    assert found["median_itl_ms"] == pytest.approx(20)
    assert found["mean_e2el_ms"] == pytest.approx(250)


def test_a_request_of_one_token_keeps_every_bound_of_tpot():
    one = [Timed(ttft=0.1, latency=0.1, prompt_tokens=1, output_tokens=1)]
    assert figures(one, 1.0, {"tpot": 0.001})["request_goodput"] == 1.0
    assert figures(one, 1.0, {"e2el": 99.0})["request_goodput"] == 0.0
    assert figures(one, 1.0, {})["request_goodput"] is None


def test_where_all_failed_every_time_is_zero():
    found = figures([Timed(error="no")] * 2, 1.0, {"ttft": 1.0})
    assert found["errors"] == {"no": 2}
    assert {value for name, value in found.items() if name.endswith("_ms")} == {0.0}


def test_arrivals_are_poisson_and_the_rate_is_exact():
    workload = Workload(url="http://x", model="m", requests=4000, rate=20.0, seed=3)
    times = np.array(arrivals(workload))
    assert times[-1] == pytest.approx(4000 / 20)
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # an exponential's
    assert arrivals(workload) == times.tolist()
    assert arrivals(workload.replace(rate=None)) == [0.0] * 4000


def test_prompts_have_exact_length_differ_and_come_again_with_their_seed():
    workload = Workload(url="http://x", model="m", requests=5, warm_up=2, prompt_tokens=9)
    made = prompts(workload, 50)
    assert [len(one) for one in made] == [9] * 7
    assert len({tuple(one) for one in made}) == 7
    assert all(0 <= token < 50 for one in made for token in one)
    assert prompts(workload, 50) == made
    assert prompts(workload.replace(seed=1), 50) != made


def test_an_unknown_bound_is_refused():
    with pytest.raises(ConfigError, match="itl:5 is no bound; allowed are ttft, tpot, e2el"):
        Workload(url="http://x", model="m", goodput={"itl": 5.0})

"""What can be drawn, and how often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.model.sampling import Sampler, SamplingParams, distribution

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)


def test_temperature_zero_takes_the_likeliest():
    assert Sampler(SamplingParams(temperature=0)).draw(torch.tensor([0.1, 3.0, 2.9])) == 1
    assert distribution(LOGITS, SamplingParams(temperature=0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46, 1e-300])
def test_a_temperature_near_zero_takes_the_likeliest_too(temperature):
    assert distribution(LOGITS, SamplingParams(temperature=temperature)).tolist() == [1, 0, 0, 0]
    assert Sampler(SamplingParams(temperature=temperature)).draw(LOGITS) == 0


def test_temperature_divides_the_logits():
    expected = (LOGITS / 0.5).softmax(-1)
    torch.testing.assert_close(distribution(LOGITS, SamplingParams(temperature=0.5)), expected)


def test_top_k_keeps_k_and_top_p_the_fewest_that_reach_p():
    assert (distribution(LOGITS, SamplingParams(top_k=2)) > 0).tolist() == [True, True, False, False]
    # Probabilities 0.644, 0.237, 0.087, 0.032: two reach 0.8, three reach 0.9.
    assert (distribution(LOGITS, SamplingParams(top_p=0.8)) > 0).tolist() == [True, True, False, False]
    assert (distribution(LOGITS, SamplingParams(top_p=0.9)) > 0).tolist() == [True, True, True, False]
    assert distribution(LOGITS, SamplingParams(top_p=1e-9)).tolist() == [1, 0, 0, 0]
    kept = distribution(LOGITS, SamplingParams(top_k=2))
    assert float(kept[0] / kept[1]) == pytest.approx(2.71828, rel=1e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=12),
    st.floats(0.01, 5),
    st.integers(0, 20),
    st.floats(0.01, 1),
)
def test_a_distribution_sums_to_one_and_holds_the_likeliest(logits, temperature, top_k, top_p):
    found = distribution(torch.tensor(logits), SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert float(found[torch.tensor(logits).argmax()]) > 0
    assert top_k == 0 or int((found > 0).sum()) <= top_k


def test_a_seed_repeats_the_draws_and_their_frequencies_are_right():
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed))
        return [sampler.draw(LOGITS) for _ in range(2000)]

    first = draws(3)
    assert first == draws(3)
    assert first != draws(4)
    counts = torch.bincount(torch.tensor(first), minlength=4) / 2000
    # Four standard deviations of the largest share: sqrt(0.644 * 0.356 / 2000) * 4 = 0.043.
    assert (counts - LOGITS.exp()).abs().max() < 0.043


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1 (given 0)"),
        ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0 (given -0.1)"),
        ({"temperature": float("nan")}, "temperature: Input should be"),
        ({"top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.1}, "top_p: Input should be less than or equal to 1"),
        ({"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"stop": ("",)}, "stop.0: String should have at least 1 character"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)

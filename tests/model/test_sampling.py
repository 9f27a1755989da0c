"""What can be drawn, and how often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.model.sampling import Sampler, SamplingParams, distribution, distributions, pick

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
        ({"max_tokens": "1"}, "max_tokens: Input should be a valid integer (given '1')"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer (given True)"),
        ({"temperature": "1"}, "temperature: Input should be a valid number (given '1')"),
        ({"temperature": True}, "temperature: Input should be a valid number (given True)"),
        ({"ignore_eos": 1}, "ignore_eos: Input should be a valid boolean (given 1)"),
        ({"stop": "x"}, "stop: Input should be a valid tuple (given 'x')"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1 (given 0)"),
        ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0 (given -0.1)"),
        ({"temperature": float("nan")}, "temperature: Input should be"),
        ({"top_p": 0.0}, "top_p: Input should be greater than 0"),
        ({"top_p": 1.1}, "top_p: Input should be less than or equal to 1"),
        ({"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"stop": ("",)}, "stop.0: String should have at least 1 character"),
        ({"stop": ("x" * 1025,)}, "stop.0: String should have at most 1024 characters"),
        ({"stop": ("x",) * 65}, "stop: Tuple should have at most 64 items"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5; it can be at most max_tokens (4)"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar are both given; a text is bound to one form"),
        ({"logit_bias": {1: 101.0}}, "logit_bias.1: Input should be less than or equal to 100"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)


def test_lists_are_tuples_and_whole_numbers_are_numbers():
    params = SamplingParams(stop=["x"], stop_token_ids=[1], temperature=1, logit_bias={2: 3})
    assert params == SamplingParams(stop=("x",), stop_token_ids=(1,), temperature=1.0, logit_bias={2: 3.0})


def test_min_p_keeps_tokens_of_a_share_of_the_likeliest():
    # Probabilities 0.644, 0.237, 0.087, 0.032.
    assert (distribution(LOGITS, SamplingParams(min_p=0.13)) > 0).tolist() == [True, True, True, False]
    assert (distribution(LOGITS, SamplingParams(min_p=0.14)) > 0).tolist() == [True, True, False, False]
    assert distribution(LOGITS, SamplingParams(min_p=1.0)).tolist() == [1, 0, 0, 0]


def test_rows_of_a_batch_are_as_if_alone():
    wishes = [
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.8, temperature=2.0),
        SamplingParams(min_p=0.3),
        SamplingParams(temperature=0),
    ]
    together = distributions(LOGITS.expand(5, 4), wishes)
    for row, params in zip(together, wishes, strict=True):
        torch.testing.assert_close(row, distribution(LOGITS, params))


def test_pick_takes_the_place_where_the_sum_passes_the_number_and_no_impossible_token():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, 5)
    assert pick(probabilities, [0.0, 0.2499, 0.25, 0.9, 1 - 2**-48]).tolist() == [1, 1, 3, 3, 3]


def test_numbers_depend_on_seed_answer_and_place_and_fill_the_unit_interval():
    def numbers(seed, index):
        sampler = Sampler(SamplingParams(seed=seed), index=index)
        return [sampler.uniform(place) for place in range(2000)]

    first = numbers(1, 0)
    assert first == numbers(1, 0)
    assert len({*first, *numbers(2, 0), *numbers(1, 1)}) == 6000
    counts = torch.histc(torch.tensor(first), 10, 0, 1)
    # Four standard deviations of a tenth of 2,000: sqrt(2000 * 0.1 * 0.9) * 4 = 54.
    assert (counts - 200).abs().max() < 54
    assert Sampler(SamplingParams()).uniform(0) != Sampler(SamplingParams()).uniform(0)


def test_penalties_bias_and_least_length_change_logits_as_documented():
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0])

    def changed(drawn=(), prompt=(), ends=frozenset(), drafts=(), **values):
        sampler = Sampler(SamplingParams(**values), prompt, ends)
        sampler.drawn.extend(drawn)
        return sampler.changed(logits, drafts).tolist()

    assert changed([0, 0, 1], presence_penalty=0.5) == [1.5, -1.5, 0.5, 3.0]
    assert changed([0, 0, 1], frequency_penalty=0.5) == [1.0, -1.5, 0.5, 3.0]
    assert changed([0], drafts=[0, 1], frequency_penalty=0.5) == [1.0, -1.5, 0.5, 3.0]
    assert changed([0], prompt=[1, 3, 3], repetition_penalty=2.0) == [1.0, -2.0, 0.5, 1.5]
    assert changed(logit_bias={1: 4.0, 3: -100.0}) == [2.0, 3.0, 0.5, -97.0]
    assert changed([2], ends=frozenset({3}), min_tokens=2) == [2.0, -1.0, 0.5, -torch.inf]
    assert changed([2, 2], ends=frozenset({3}), min_tokens=2) == logits.tolist()
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0]

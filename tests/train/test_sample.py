"""Samples: the cache's tokens are those of whole forward passes, and the same every time."""

import pytest
import torch

from benthic.data import prepare
from benthic.model.decoding import decode
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.model.sampling import SamplingParams
from benthic.train.sample import complete
from tests.train.small import small_model, small_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return prepare(small_run().data, tmp_path_factory.mktemp("data")).tokenizer


@pytest.fixture(scope="module")
def model():
    found = LanguageModel(small_model())
    initialise(found, 0)
    return found


@torch.no_grad()
def test_greedy_samples_are_the_likeliest_tokens_of_whole_forward_passes(model, tokenizer):
    ids = tokenizer.encode("sort 3 1 2", add_bos=tokenizer.add_bos_token)
    start = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.eos_id not in ids[start:]
    assert complete(model, tokenizer, "sort 3 1 2", 8, 0.0) == tokenizer.decode(ids[start:])


def test_samples_with_a_temperature_are_the_same_whatever_was_drawn_before(model, tokenizer):
    first = complete(model, tokenizer, "sort", 8, 1.0)
    torch.rand(3)
    assert complete(model, tokenizer, "sort", 8, 1.0) == first
    assert complete(model, tokenizer, "sort", 8, 0.0) != first


def test_a_prompt_that_fills_the_models_positions_gets_nothing(model, tokenizer):
    assert complete(model, tokenizer, "copy " * 100, 8, 0.0) == ""


def test_the_tokens_that_ranks_agree_on_are_taken_whatever_this_one_drew(model):
    rank_0 = iter([5, 6, 7, 8])
    params = SamplingParams(max_tokens=8, temperature=0.0)
    assert list(decode(model, [1, 2, 3], params, {7}, agreed=lambda drawn: next(rank_0))) == [5, 6]
    assert next(rank_0) == 8

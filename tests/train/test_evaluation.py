"""Validation against sums taken from logits one position at a time."""

import math
from itertools import islice

import pytest
import torch

from benthic.data import Batch, prepare
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.train.evaluation import held_out, validate
from tests.train.small import small_model, small_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(small_run().data, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    found = LanguageModel(small_model(num_nextn_predict_layers=2))
    initialise(found, 0)
    return found


def test_every_held_out_token_but_the_first_is_counted_once_and_bytes_are_exact(corpus, model):
    batches = list(held_out(corpus.validation, 16, 4, None))
    found = validate(model, batches, corpus.token_bytes, False)
    assert found.tokens == corpus.validation.facts.tokens - 1
    first = int(corpus.validation.tokens[0])
    assert found.text_bytes == corpus.validation.facts.text_bytes - int(corpus.token_bytes[first])
    nats = 0.0
    for batch in batches:
        logs = model(batch.tokens[:, :-1]).detach().double().log_softmax(-1)
        nats -= logs.gather(-1, batch.tokens[:, 1:, None]).sum().item()
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.text_bytes, rel=1e-6)


def test_acceptance_is_agreement_with_the_main_models_own_next_token(corpus, model):
    batches = list(islice(held_out(corpus.validation, 16, 4, None), 3))
    found = validate(model, batches, corpus.token_bytes, False)
    for depth in (1, 2):
        agreed = compared = 0
        for batch in batches:
            logits, predicted = model(batch.tokens[:, :-1], return_mtp=True)
            for sequence in range(len(batch.tokens)):
                for position in range(16 - depth):
                    drafted = predicted[depth - 1][sequence, position].argmax()
                    agreed += int(drafted == logits[sequence, position + depth].argmax())
                    compared += 1
        assert found.acceptance[depth - 1] == agreed / compared


def test_loads_cover_the_whole_set(corpus, model):
    found = validate(model, islice(held_out(corpus.validation, 16, 4, None), 2), corpus.token_bytes, False)
    assert int(found.loads[1].sum()) == 2 * 4 * 16 * 2
    assert sorted(found.loads) == [1, 2, 3]
    assert found.max_violation > 0


def test_max_tokens_bounds_what_is_read(corpus):
    read = [batch.tokens[:, 1:].numel() for batch in held_out(corpus.validation, 16, 2, 100)]
    assert read == [32, 32, 32, 32]


def test_a_window_shorter_than_the_prediction_depth_is_no_obstacle(corpus, model):
    short = Batch(torch.tensor([[5, 6]]), torch.zeros(1, 2, dtype=torch.int64))
    assert validate(model, [short], corpus.token_bytes, False).tokens == 1

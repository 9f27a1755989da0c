"""Stages one after another are the model they were cut from."""

import pytest
import torch

from benthic.model import LanguageModel, initialise
from benthic.model.stage import cut_to_stages, width_passed
from tests.train.small import small_model


@pytest.mark.parametrize("predictions", [0, 2])
@pytest.mark.parametrize("cut", [[4], [1, 3], [2, 3, 4]])
def test_states_passed_from_stage_to_stage_are_those_of_the_whole_model(predictions, cut):
    config = small_model(num_hidden_layers=4, num_nextn_predict_layers=predictions)
    whole = LanguageModel(config)
    initialise(whole, 0)
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(12).div(5, rounding_mode="floor").expand(2, -1)
    expected = whole.states(tokens, documents=documents, num_predictions=predictions)
    # With predictions the last cut leaves a stage of prediction layers alone.
    ends = [*cut, config.num_hidden_layers + predictions]
    stages = [range(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]
    passed, routing, found = None, {}, expected
    for stage in cut_to_stages(whole, stages):
        found = stage(tokens, passed, documents, predictions)
        passed = found.hidden
        routing |= found.routing
        if not stage.ends:
            assert passed.shape == (2, 12, width_passed(config))
    assert torch.equal(found.hidden, expected.hidden)
    assert len(found.predictions) == predictions
    assert all(map(torch.equal, found.predictions, expected.predictions))
    assert routing.keys() == expected.routing.keys()


def test_what_is_left_of_the_model_has_the_stages_tensors_under_their_names():
    whole = LanguageModel(small_model(num_hidden_layers=4))
    every = dict(whole.named_parameters())
    middle = cut_to_stages(whole, [range(1, 2), range(3, 4)])
    kept = dict(whole.named_parameters())
    assert [name for name in every if name in kept] == list(kept)
    assert {name.split(".")[2] for name in kept} == {"1", "3"}
    assert {id(one) for one in kept.values()} == {id(one) for stage in middle for one in stage.parameters()}
    (last,) = cut_to_stages(LanguageModel(small_model(num_hidden_layers=4)), [range(3, 5)])
    assert last.head_weight is last.lm_head.weight
    assert "model.norm.weight" in dict(last.named_parameters())
    assert middle[0].head_weight is None

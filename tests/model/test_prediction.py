"""Prediction layers see what they may, and the row that is judged is the right one."""

from __future__ import annotations

import pytest
import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference.loss import cross_entropy, prediction_loss
from benthic.ops import linear_cross_entropy
from tests.model.configs import CONFIGS, randomised, tiny, tokens


@pytest.mark.parametrize("name", ["v3 of two predictions", "multi-query with predictions"])
@torch.no_grad()
def test_depth_k_at_position_i_sees_tokens_up_to_i_plus_k_and_no_further(name):
    config = tiny(**CONFIGS[name])
    model, ids = randomised(config), tokens(config, 1, 12)
    _, before = model(ids, return_mtp=True)
    for depth, logits in enumerate(before, 1):
        assert logits.shape == (1, 12 - depth, config.vocab_size)
        for position in range(12 - depth - 1):
            changed = ids.clone()
            changed[0, position + depth + 1] = (changed[0, position + depth + 1] + 7) % config.vocab_size
            _, after = model(changed, return_mtp=True)
            assert_close(after[depth - 1][0, : position + 1], logits[0, : position + 1], "model_fp32")
            changed = ids.clone()
            changed[0, position + depth] = (changed[0, position + depth] + 7) % config.vocab_size
            _, after = model(changed, return_mtp=True)
            assert (after[depth - 1][0, position] - logits[0, position]).abs().max() > 1e-2


@torch.no_grad()
def test_prediction_loss_judges_row_i_by_token_i_plus_k_plus_1():
    config = tiny(**CONFIGS["v3 of two predictions"])
    model, stream = randomised(config), tokens(config, 2, 13)
    ids, labels = stream[:, :-1], stream[:, 1:]
    states = model.states(ids, num_predictions=2)
    _, logits = model(ids, return_mtp=True)
    for depth, expected in enumerate(prediction_loss(logits, ids, labels), 1):
        # What a trainer computes: labels moved on by k more, the last k positions without a target.
        judged = labels[:, depth:]
        summed, counted = linear_cross_entropy(
            states.predictions[depth - 1].flatten(0, 1), model.head_weight, judged.flatten()
        )
        assert counted == 2 * (12 - depth)
        assert_close(summed / ids.numel(), expected, "operation_fp32")
        # The trap: labels that are not moved judge a row by a token the layer was given.
        trap, _ = cross_entropy(logits[depth - 1].flatten(0, 1), labels[:, :-depth].flatten())
        assert abs(trap / ids.numel() - expected) > 1e-2


@torch.no_grad()
def test_the_embedding_comes_first_and_the_state_is_after_the_final_norm():
    config = tiny(**CONFIGS["v3"])
    model, ids = randomised(config), tokens(config, 1, 6)
    layer, width = model.model.layers[3], config.hidden_size
    states = model.states(ids, num_predictions=1)
    seen = []
    layer.hnorm.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    layer.eh_proj.weight[:, :width] = 0
    without_embedding = model.states(ids, num_predictions=1).predictions[0]
    assert_close(seen[0], states.hidden[:, :-1], "operation_fp32")
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % config.vocab_size
    assert_close(model.states(changed, num_predictions=1).predictions[0], without_embedding, "model_fp32")
    assert not torch.allclose(states.predictions[0], without_embedding, atol=1e-2)


@torch.no_grad()
def test_deeper_layers_take_the_state_after_shared_head_norm():
    config = tiny(**CONFIGS["v3 of two predictions"])
    model, ids = randomised(config), tokens(config, 1, 6)
    seen = []
    model.model.layers[4].hnorm.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    states = model.states(ids, num_predictions=2)
    assert_close(seen[0], states.predictions[0][:, :-1], "operation_fp32")

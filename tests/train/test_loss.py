"""The loss by an independent computation from logits, the label-shift trap, accumulation equal to the large batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benthic.config.data import DataConfig
from benthic.config.train import BalanceConfig, BatchConfig, OptimizerConfig
from benthic.data import Batch
from benthic.errors import NumericsError
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.train.loss import IGNORED, Scale, labels, losses
from benthic.train.optimizer import Optimizer
from benthic.train.schedule import Place
from benthic.train.step import finish, launch, micro_batches
from tests.train.small import small_model, small_run

LENGTH = 12


def random_batch(sequences=4, seed=0, vocabulary=320):
    tokens = torch.randint(vocabulary, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    documents = (torch.arange(LENGTH + 1) >= 5).long().expand_as(tokens)
    return Batch(tokens, documents)


def small(depths=1, seed=3):
    model = LanguageModel(small_model(num_nextn_predict_layers=depths))
    initialise(model, seed)
    return model


def cross_entropy(logits, targets):
    """Summed over all targets, in float64."""
    logits = logits.detach().double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(logs, targets.numpy()[..., None], -1).sum()


def whole(batch):
    return Scale(batch.tokens[:, 1:].numel(), len(batch.tokens))


NO_BALANCE = BalanceConfig(auxiliary_loss="none")


@pytest.mark.parametrize("depths", [1, 2])
def test_losses_equal_an_independent_computation_from_logits(depths):
    model, batch = small(depths), random_batch()
    logits, predicted = model(batch.tokens[:, :-1], return_mtp=True)
    tokens = batch.tokens.shape[0] * LENGTH
    main = cross_entropy(logits, batch.tokens[:, 1:]) / tokens
    # Row i of depth k predicts token i + k + 1, and the sum is divided by T although it has k terms a sequence less.
    each = [cross_entropy(one, batch.tokens[:, k + 1 :]) / tokens for k, one in enumerate(predicted, start=1)]
    found = losses(model, batch, whole(batch), False, 0.3, NO_BALANCE)
    assert found.main.item() == pytest.approx(main, rel=1e-5)
    assert found.prediction.item() == pytest.approx(np.mean(each), rel=1e-5)
    assert found.total.item() == pytest.approx(main + 0.3 * np.mean(each), rel=1e-5)


def test_the_label_of_prediction_k_is_the_token_after_the_last_one_it_was_given():
    batch = random_batch(1)
    for depth in range(3):
        targets = labels(batch, depth, masked=False)
        assert targets.shape == (1, LENGTH - depth)
        assert [targets[0, i].item() for i in (0, 4)] == [batch.tokens[0, i + depth + 1].item() for i in (0, 4)]


def test_a_prediction_cannot_see_its_label():
    """Changing token i + k + 1 must leave the state that predicts it as it was: else the layer learns to copy."""
    model, batch = small(), random_batch(1)
    other = batch.tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % 320
    before, after = (model.states(one[:, :-1], num_predictions=1).predictions[0] for one in (batch.tokens, other))
    # Position 5 of depth 1 predicts token 7; position 6 is given it.
    torch.testing.assert_close(before[0, :6], after[0, :6], rtol=0, atol=1e-5)
    assert (before[0, 6] - after[0, 6]).abs().max() > 0.1


def test_labels_across_documents_are_ignored_when_documents_are_masked():
    batch = random_batch(1)
    assert (labels(batch, 0, masked=True)[0] == IGNORED).nonzero().flatten().tolist() == [4]
    assert (labels(batch, 1, masked=True)[0] == IGNORED).nonzero().flatten().tolist() == [3, 4]


def test_masked_documents_equal_documents_alone():
    model, batch = small(), random_batch(2)
    found = losses(model, batch, whole(batch), True, 0.0, NO_BALANCE).main * whole(batch).valid_tokens
    parts = [Batch(batch.tokens[:, span], batch.documents[:, span]) for span in (slice(0, 5), slice(5, None))]
    alone = [losses(model, part, whole(part), False, 0.0, NO_BALANCE).main * whole(part).valid_tokens for part in parts]
    assert found.item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_gradients_of_micro_batches_add_up_to_the_whole_batch():
    model, batch = small(), random_batch()
    config = BalanceConfig(auxiliary_loss="sequence", alpha=0.1)
    gradients = []
    for size in (4, 2, 1):
        model.zero_grad()
        for micro in micro_batches(batch, size):
            losses(model, micro, whole(batch), True, 0.3, config).total.backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_an_update_is_the_same_in_micro_batches_loads_included(tmp_path: Path):
    results = []
    for size in (4, 1):
        model = small()
        # A large epsilon: with a small one the first step is the gradient's sign, which rounding decides near zero.
        adam = OptimizerConfig(learning_rate=1e-3, epsilon=1e-2)
        config = small_run(batch=BatchConfig(sequences=4, micro_sequences=size), optimizer=adam)
        optimizer = Optimizer(model, config.optimizer)
        done = finish(launch(model, optimizer, random_batch(), Place(4, 0, 12), config), tmp_path)
        results.append((done, model.state_dict()))
    (one, weights), (other, others) = results
    assert {layer: load.tolist() for layer, load in one.loads.items()} == {
        layer: load.tolist() for layer, load in other.loads.items()
    }
    assert sum(one.loads[1].tolist()) == 4 * LENGTH * 2
    assert sum(one.loads[2].tolist()) == 4 * (LENGTH - 1) * 2
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-6, msg=name)


def test_recomputation_in_the_backward_pass_counts_no_load_twice():
    from torch.utils.checkpoint import checkpoint

    plain, recomputed = small(), small()
    for layer in recomputed.model.layers:
        layer.forward = _recomputing(layer.forward, checkpoint)
    config = small_run()
    counts = [
        launch(model, Optimizer(model, config.optimizer), random_batch(), Place(1, 0, 12), config).loads
        for model in (plain, recomputed)
    ]
    assert counts[0][1].tolist() == counts[1][1].tolist()


def _recomputing(forward, checkpoint):
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


def test_a_batch_without_any_label_is_refused():
    config = small_run(
        data=DataConfig(source="procedural", vocab_size=320, sequence_length=LENGTH, mask_documents=True)
    )
    model, batch = small(), random_batch()
    alone = Batch(batch.tokens, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens))
    with pytest.raises(NumericsError, match="update 4 has no label: every token's next one is in another document"):
        launch(model, Optimizer(model, config.optimizer), alone, Place(4, 0, 12), config)

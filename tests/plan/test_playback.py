"""A played step leaves the ledger as it found it, gradients apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config.parallel import ParallelConfig
from benthic.plan.holdings import pipeline_rank
from benthic.plan.ledger import Ledger
from benthic.plan.playback import Playback
from benthic.plan.training import RECOMPUTATIONS, Training
from tests.plan.configs import configs


@given(configs(), st.integers(1, 32), st.integers(1, 3), st.sampled_from(RECOMPUTATIONS))
@settings(max_examples=60, deadline=None)
def test_everything_kept_is_freed_and_every_parameter_has_its_gradient(config, length, micro_batches, recomputation):
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    held = pipeline_rank(config, ParallelConfig(), [range(layers)], 0)
    ledger = Ledger()
    training = Training(length, micro_batches=micro_batches, recomputation=recomputation)
    Playback(config, training, ParallelConfig(), held, 0, ledger).play()
    for (part, name), size in ledger.alive.items():
        expected = 4 * held.total.elements if part == "gradients" else 0.0
        assert size == pytest.approx(expected, abs=1e-3), name

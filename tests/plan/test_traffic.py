"""Memory traffic of the plain path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.plan.traffic import accumulation_bytes, layer_traffic, loss_traffic, update_bytes
from tests.plan.configs import configs

LITE = ModelConfig.from_pretrained("deepseek-v2-lite")


@given(configs(), st.integers(0, 2))
def test_every_operation_moves_bytes_and_float32_moves_more(config, layer):
    narrow, wide = (layer_traffic(config, layer, precision) for precision in ("bf16", "fp32"))
    assert all(one.forward + one.backward > 0 for one in narrow)
    assert sum(one.forward for one in wide) > sum(one.forward for one in narrow)


def test_expert_rows_are_the_bulk_of_an_expert_layer():
    rows = {one.name: one.forward + one.backward for one in layer_traffic(LITE, 5, "bf16")}
    wide = rows["rows to experts"] + rows["rows back"] + rows["weighted sum"]
    assert wide > 0.4 * sum(rows.values())
    assert rows["rows to experts"] == 6 * 2 * 6 * 2048


def test_the_update_reads_and_writes_masters_moments_and_gradients():
    # Norm 4, scale 8, AdamW 28, and a bf16 copy from float32 6 bytes an element.
    assert (update_bytes("fp32"), update_bytes("bf16")) == (40, 46)
    assert (accumulation_bytes("fp32"), accumulation_bytes("bf16")) == (12, 10)


def test_loss_traffic_grows_with_the_vocabulary_alone():
    assert loss_traffic(LITE, "bf16") == pytest.approx(LITE.vocab_size * 28)
    assert loss_traffic(LITE.replace(num_hidden_layers=3), "bf16") == loss_traffic(LITE, "bf16")

"""Memory traffic of a step on a GPU: every operation that autograd runs, and what only depends on few sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benthic.config import ModelConfig
from benthic.model import LanguageModel
from benthic.model.float8 import use_float8, weights_unchanged
from benthic.plan.kernels import Kernels
from benthic.plan.traffic import (
    accumulation_traffic,
    head_traffic,
    head_weight_traffic,
    layer_traffic,
    update_traffic,
)
from benthic.plan.training import Training
from tests.plan.configs import configs
from tests.plan.gpu_path import MOVED, SHAPES, size, take_gpu_path

LITE = ModelConfig.from_pretrained("deepseek-v2-lite")
V3 = ModelConfig.from_pretrained("deepseek-v3")


def moved(kernels: list[Kernels], phase: str) -> float:
    return sum(one.bytes for one in kernels if one.phase == phase)


class Traced(TorchDispatchMode):
    """Bytes in and out of every torch operation, by phase, and of every kernel. Left out: views, products, what stands
    in for attention (it fills its results), and orders of rows, whose numbers are few."""

    LEFT_OUT = (
        "view _unsafe_view t transpose slice split split_with_sizes expand unsqueeze squeeze detach permute select "
        "alias empty_like new_empty new_empty_strided mm addmm _grouped_mm embedding embedding_dense_backward "
        "new_zeros zeros zeros_like index scatter_"
    ).split()

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.bytes = "forward", {"forward": 0.0, "backward": 0.0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.collect()
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.LEFT_OUT:
            tensors = [one for one in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if torch.is_tensor(one)]
            self.bytes[self.phase] += sum(size(one) for one in tensors)
        return out

    def collect(self) -> None:
        """Take over what kernels have left."""
        self.bytes[self.phase] += sum(moved for _, moved in MOVED)
        MOVED.clear()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_every_kernel_and_operation_that_autograd_runs(shape, precision, monkeypatch):
    take_gpu_path(monkeypatch)
    # Wide, so that numbers of experts and positions are small beside rows.
    config = ModelConfig(**SHAPES[shape] | dict(max_position_embeddings=2048))
    config = config.replace(hidden_size=8 * config.hidden_size, moe_intermediate_size=512, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
        tokens = torch.zeros(2, 2048, dtype=torch.int64)
    if precision == "fp8":
        use_float8(model)
    with weights_unchanged(model):
        model.states(tokens)  # Rotations are computed once, weights quantised once an update.
        MOVED.clear()
        with Traced() as traced:
            hidden = model.states(tokens).hidden
            traced.collect()
            traced.phase = "backward"
            hidden.backward(torch.empty_like(hidden))
            traced.collect()
    layers = [one for layer in range(config.num_hidden_layers) for one in layer_traffic(config, layer, precision)]
    layers += [one for one in head_traffic(config, precision, 1) if one.name == "final norm"]
    for phase in ("forward", "backward"):
        ours = moved(layers, phase)
        assert tokens.numel() * ours == pytest.approx(traced.bytes[phase], rel=0.04), phase


@given(configs(), st.integers(0, 2))
def test_every_operation_moves_bytes_and_float32_moves_twice_as_many(config, layer):
    narrow, quantised, wide = (layer_traffic(config, layer, precision) for precision in ("bf16", "fp8", "fp32"))
    assert all(one.bytes > 0 and one.launches > 0 for one in (*narrow, *quantised))
    routing = ("choice", "sorting rows by expert", "order of weights")
    forward = [moved([one for one in found if one.name not in routing], "forward") for found in (narrow, wide)]
    assert forward[1] == 2 * forward[0]


def test_expert_rows_are_the_bulk_of_an_expert_layer():
    layer = layer_traffic(LITE, 5, "bf16")
    rows = [one for one in layer if "rows" in one.name and one.name != "sorting rows by expert"]
    assert sum(one.bytes for one in rows) > 0.5 * sum(one.bytes for one in layer)
    # A token's row is read once and written for each choice; backward takes the gradient's and the input's.
    to_experts = [one.bytes for one in layer if one.name == "rows to experts"]
    assert to_experts == [2 * 7 * 2048, 2 * 2 * 7 * 2048]


def test_the_update_reads_and_writes_masters_moments_and_gradients_once():
    # A norm of 2 or 4 bytes an element, then gradient, master and moments, and the computing copy.
    cases = {
        Training(64): 2 + 28,
        Training(64, bf16_moments=True): 2 + 20,
        Training(64, micro_batches=2): 4 + 30,
        Training(64, precision="fp8", bf16_moments=True): 2 + 20,
        Training(64, precision="fp32"): 4 + 28,
    }
    for training, expected in cases.items():
        assert moved(update_traffic(training), "forward") == expected


def test_a_lone_micro_batch_adds_up_nothing():
    # The second's gradients meet the first's: both to float32, one pass to cast, one to add.
    assert [moved(accumulation_traffic("bf16", count), "backward") for count in (1, 2, 4)] == [0, 3 + 5, 1.5 + 7.5]
    assert [moved(accumulation_traffic("fp32", count), "backward") for count in (1, 2, 4)] == [0, 6, 9]


def test_the_loss_grows_with_the_vocabulary_and_its_gradient_with_the_blocks():
    wider = LITE.replace(vocab_size=2 * LITE.vocab_size)
    by_token = [moved(head_traffic(config, "bf16", 1), "forward") for config in (LITE, wider)]
    assert by_token[1] - by_token[0] == LITE.vocab_size * (2 + 2)
    one, two, three = (moved(head_weight_traffic("bf16", blocks, 1), "forward") for blocks in (1, 2, 3))
    assert (one, two, three - two) == (0, 12 + 6, 12)
    assert moved(head_weight_traffic("bf16", 2, 2), "forward") == 2 * two


def test_fp8_halves_the_rows_and_pays_for_it_with_quantisation():
    narrow, wide = (layer_traffic(LITE, 5, precision) for precision in ("fp8", "bf16"))
    casts = sum(one.bytes for one in narrow if one.kind in ("quantise", "retile"))
    rows = [sum(one.bytes for one in found if one.name == "rows to experts") for found in (narrow, wide)]
    assert rows[0] < 0.7 * rows[1]
    assert casts > 0.25 * sum(one.bytes for one in narrow)

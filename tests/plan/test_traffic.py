"""Memory traffic of the plain path: every operation that autograd runs, and what only depends on few sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benthic.config import ModelConfig
from benthic.model import LanguageModel
from benthic.plan.kernels import Kernels
from benthic.plan.traffic import (
    accumulation_traffic,
    head_traffic,
    head_weight_traffic,
    layer_traffic,
    update_traffic,
)
from tests.plan.configs import configs
from tests.plan.gpu_path import SHAPES, take_gpu_path

LITE = ModelConfig.from_pretrained("deepseek-v2-lite")
V3 = ModelConfig.from_pretrained("deepseek-v3")


def moved(kernels: list[Kernels], phase: str) -> float:
    return sum(one.bytes for one in kernels if one.phase == phase)


def size(tensor: torch.Tensor) -> int:
    """Bytes, those of a broadcast dimension once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


class Traced(TorchDispatchMode):
    """Bytes in and out of every operation, by phase. Left out: views, products, what stands in for norms and attention
    (it fills its results), adding rows by number, which reads the sum once a row and not once, and taking a complex
    array's parts, whose gradients are arrays cleared and filled."""

    LEFT_OUT = (
        "view _unsafe_view t transpose slice split split_with_sizes expand unsqueeze squeeze detach permute select "
        "alias view_as_real view_as_complex _conj empty_like new_empty_strided mm addmm _grouped_mm embedding "
        "embedding_dense_backward new_zeros zeros zeros_like full_like clone index_add select_backward"
    ).split()

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.bytes = "forward", {"forward": 0, "backward": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.LEFT_OUT:
            tensors = [one for one in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if torch.is_tensor(one)]
            self.bytes[self.phase] += sum(size(one) for one in tensors)
        return out


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_every_operation_that_autograd_runs(shape, monkeypatch):
    take_gpu_path(monkeypatch)
    # Wide, so that numbers of experts and positions are small beside rows.
    config = ModelConfig(**SHAPES[shape] | dict(max_position_embeddings=512))
    config = config.replace(hidden_size=8 * config.hidden_size, moe_intermediate_size=512, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
        tokens = torch.zeros(2, 512, dtype=torch.int64)
    model.states(tokens)  # The rotations are computed once.
    with Traced() as traced:
        hidden = model.states(tokens).hidden
        traced.phase = "backward"
        hidden.backward(torch.empty_like(hidden))
    layers = [one for layer in range(config.num_hidden_layers) for one in layer_traffic(config, layer, "bf16")]
    for phase in ("forward", "backward"):
        counted = [one for one in layers if one.kind not in ("norm", "scatter_add")]
        counted = [one for one in counted if not one.name.endswith(("cleared", "filled"))]
        ours = moved(counted, phase)
        assert tokens.numel() * ours == pytest.approx(traced.bytes[phase], rel=0.04), phase


@given(configs(), st.integers(0, 2))
def test_every_operation_moves_bytes_and_float32_moves_more(config, layer):
    narrow, wide = (layer_traffic(config, layer, precision) for precision in ("bf16", "fp32"))
    assert all(one.bytes > 0 and one.launches > 0 for one in narrow)
    without_casts = [one for one in narrow if one.kind not in ("widen", "narrow")]
    assert moved(wide, "forward") > moved(without_casts, "forward")


def test_expert_rows_are_the_bulk_of_an_expert_layer():
    layer = layer_traffic(LITE, 5, "bf16")
    rows = [one for one in layer if one.name.startswith(("rows", "weighted sum"))]
    assert sum(one.bytes for one in rows) > 0.4 * sum(one.bytes for one in layer)
    # A row is read and written going to its expert; its gradient is read, and the sum read and written.
    to_experts = [one.bytes for one in layer if one.name == "rows to experts"]
    assert to_experts == [2 * 2 * 6 * 2048, 3 * 2 * 6 * 2048]


def test_the_update_reads_and_writes_masters_moments_and_gradients():
    # Norm 4, scale 8, AdamW 28, and a bf16 copy from float32 6 bytes an element.
    assert [moved(update_traffic(precision), "forward") for precision in ("fp32", "bf16")] == [40, 46]


def test_the_first_gradients_of_a_step_are_cast_and_later_ones_added():
    assert [moved(accumulation_traffic("bf16", count), "backward") for count in (1, 2, 4)] == [6, 8, 9]
    assert [moved(accumulation_traffic("fp32", count), "backward") for count in (1, 2, 4)] == [0, 6, 9]


def test_the_loss_grows_with_the_vocabulary_and_its_gradient_with_the_blocks():
    wider = LITE.replace(vocab_size=2 * LITE.vocab_size)
    by_token = [moved(head_traffic(config, "bf16", 1), "forward") for config in (LITE, wider)]
    assert by_token[1] - by_token[0] == LITE.vocab_size * (6 + 6 + 6)
    one, two = (moved(head_weight_traffic("bf16", blocks, 1), "forward") for blocks in (1, 2))
    assert two - one == 10
    assert moved(head_weight_traffic("bf16", 1, 2), "forward") == 2 * one


def test_fused_fp8_moves_less_than_the_plain_path():
    for phase in ("forward", "backward"):
        assert moved(layer_traffic(V3, 30, "fp8"), phase) < moved(layer_traffic(V3, 30, "bf16"), phase)

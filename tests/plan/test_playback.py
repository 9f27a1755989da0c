"""A played step against a real one: the same highest moment, and nothing left behind but gradients."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.config.train import BalanceConfig, OptimizerConfig
from benthic.data.loader import Batch
from benthic.model import LanguageModel
from benthic.model.float8 import use_float8, weights_unchanged
from benthic.plan.devices import DEVICES
from benthic.plan.holdings import pipeline_rank
from benthic.plan.ledger import Ledger
from benthic.plan.memory import training_memory
from benthic.plan.playback import Playback
from benthic.plan.training import RECOMPUTATIONS, Training
from benthic.train.loss import Scale, losses
from benthic.train.optimizer import Optimizer
from benthic.train.recomputation import recompute
from tests.plan.configs import configs
from tests.plan.gpu_path import LATENT, PLAIN, take_gpu_path


@given(configs(), st.integers(1, 32), st.integers(1, 3), st.sampled_from(RECOMPUTATIONS))
@settings(max_examples=60, deadline=None)
def test_everything_kept_is_freed_and_every_parameter_has_its_gradient(config, length, micro_batches, recomputation):
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    held = pipeline_rank(config, ParallelConfig(), [range(layers)], 0)
    ledger = Ledger()
    training = Training(length, micro_batches=micro_batches, recomputation=recomputation)
    Playback(config, training, ParallelConfig(), held, 0, ledger, 1 << 31).play()
    each = 2 if micro_batches == 1 else 4
    for (part, name), size in ledger.alive.items():
        expected = each * held.total.elements if part == "gradients" else 0.0
        assert size == pytest.approx(expected, abs=1e-3), (part, name)


LONG = {"max_position_embeddings": 4096}
WIDE = LATENT | LONG | dict(hidden_size=256, moe_intermediate_size=176, num_experts_per_tok=4, n_routed_experts=16)
PREDICTING = WIDE | dict(num_nextn_predict_layers=1, num_hidden_layers=2)
STEPS = {
    "experts, activations above all": (WIDE | dict(q_lora_rank=None, n_shared_experts=2), Training(512, 2), 27),
    "experts, layers recomputed": (WIDE, Training(512, 2, recomputation="layer"), 27),
    "experts, latents expanded again": (WIDE, Training(512, 2, recomputation="up_projections"), 27),
    "experts in FP8": (WIDE, Training(512, 2, precision="fp8"), 27),
    "experts in FP8, whole scales": (WIDE | dict(moe_intermediate_size=256), Training(512, 2, precision="fp8"), 27),
    "experts in FP8, latents expanded again": (
        WIDE,
        Training(512, 2, precision="fp8", recomputation="up_projections"),
        27,
    ),
    "experts in FP8, layers recomputed": (WIDE, Training(512, 2, precision="fp8", recomputation="layer"), 27),
    "prediction layer": (PREDICTING, Training(256, 2), 27),
    "prediction layer, recomputed": (PREDICTING, Training(512, 2, recomputation="layer"), 27),
    "prediction layer in FP8": (PREDICTING, Training(512, 2, precision="fp8"), 27),
    "few tokens, many experts": (WIDE | dict(n_routed_experts=32), Training(32), 27),
    "few tokens, many experts, in FP8": (WIDE | dict(n_routed_experts=32), Training(32, precision="fp8"), 27),
    "two micro-batches": (WIDE, Training(256, 2, micro_batches=2), 27),
    "three micro-batches": (WIDE, Training(256, 2, micro_batches=3), 27),
    "few tokens, three micro-batches": (WIDE | dict(n_routed_experts=32), Training(32, micro_batches=3), 27),
    "dense": (PLAIN | LONG | dict(hidden_size=256, intermediate_size=700), Training(512, 2), 27),
    "dense in FP8": (
        PLAIN | LONG | dict(hidden_size=256, intermediate_size=720),
        Training(512, 2, precision="fp8"),
        27,
    ),
    "vocabulary in one block": (PLAIN | LONG | dict(vocab_size=20_000), Training(256, 2), 27),
    "vocabulary in blocks": (PLAIN | LONG | dict(vocab_size=20_000), Training(256, 2), 21),
    "tied vocabulary": (PLAIN | LONG | dict(vocab_size=20_000, tie_word_embeddings=True), Training(32), 27),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_peak_of_a_real_step_is_the_played_one(name, monkeypatch, tmp_path):
    fields, training, logits = STEPS[name]
    take_gpu_path(monkeypatch)
    monkeypatch.setattr(sys.modules["benthic.ops.linear_cross_entropy"], "_BLOCK_ELEMENTS", {"cuda": 1 << logits})
    config = ModelConfig(**fields)
    memory = training_memory(config, training, device=replace(DEVICES["h200"], logits_at_a_time=1 << logits))
    states = sum(memory.by_part[part] for part in ("weights", "master weights", "moments"))
    peak = _peak_of_real_step(config, training, tmp_path)
    assert memory.allocated - states == pytest.approx(peak, rel=0.02), memory.moment


def _peak_of_real_step(config: ModelConfig, training: Training, folder: Path) -> int:
    """Most bytes alive at once in the second step, beyond what was alive before it."""
    model = LanguageModel(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    if training.precision == "fp8":
        use_float8(model)
    recompute(model, training.recomputation)
    # Moments in bfloat16 are those of the one-pass update, as a GPU makes it.
    optimizer = Optimizer(model, OptimizerConfig(), "bfloat16")
    stream = torch.Generator().manual_seed(0)
    shape = (training.micro_batch * training.micro_batches, training.sequence_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=stream)
    with weights_unchanged(model):
        _backward(model, tokens, training)
        optimizer.zero_gradients()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            _backward(model, tokens, training)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    alive = highest = 0
    for event in sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"]):
        alive += event["args"]["Bytes"]
        highest = max(highest, alive)
    return highest


def _backward(model: LanguageModel, tokens: torch.Tensor, training: Training) -> None:
    """All of a step but the update, which allocates nothing on a GPU."""
    scale = Scale(tokens[:, 1:].numel(), len(tokens))
    for rows in tokens.split(training.micro_batch):
        losses(model, Batch(rows, torch.zeros_like(rows)), scale, False, 0.3, BalanceConfig()).total.backward()

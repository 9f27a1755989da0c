"""A played step against a real one: the same highest moment, and nothing left behind but gradients."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.config.train import BalanceConfig, OptimizerConfig
from benthic.data.loader import Batch
from benthic.model import LanguageModel
from benthic.plan import playback
from benthic.plan.holdings import pipeline_rank
from benthic.plan.ledger import Ledger
from benthic.plan.memory import training_memory
from benthic.plan.playback import Playback
from benthic.plan.training import RECOMPUTATIONS, Training
from benthic.train.loss import Scale, losses
from benthic.train.optimizer import Optimizer, joint_norm
from tests.plan.configs import configs
from tests.plan.gpu_path import LATENT, PLAIN, take_gpu_path


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
        assert size == pytest.approx(expected, abs=1e-3), (part, name)


LONG = {"max_position_embeddings": 4096}
WIDE = LATENT | LONG | dict(hidden_size=256, moe_intermediate_size=176, num_experts_per_tok=4, n_routed_experts=16)
STEPS = {
    "experts, activations above all": (WIDE | dict(q_lora_rank=None, n_shared_experts=2), Training(512, 2), 27),
    "experts, layers recomputed": (WIDE, Training(512, 2, recomputation="layer"), 27),
    "prediction layer": (WIDE | dict(num_nextn_predict_layers=1, num_hidden_layers=2), Training(256, 2), 27),
    "prediction layer, recomputed": (
        WIDE | dict(num_nextn_predict_layers=1, num_hidden_layers=2),
        Training(512, 2, recomputation="layer"),
        27,
    ),
    "few tokens, many experts": (WIDE | dict(n_routed_experts=32), Training(32), 27),
    "gradients of micro-batches before": (WIDE, Training(256, 2, micro_batches=3), 27),
    "dense": (PLAIN | LONG | dict(hidden_size=256, intermediate_size=700), Training(512, 2), 27),
    "vocabulary in one block": (PLAIN | LONG | dict(vocab_size=20_000), Training(256, 2), 27),
    "vocabulary in blocks": (PLAIN | LONG | dict(vocab_size=20_000), Training(256, 2), 21),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_peak_of_a_real_step_is_the_played_one(name, monkeypatch, tmp_path):
    fields, training, logits = STEPS[name]
    take_gpu_path(monkeypatch)
    loss_module = sys.modules["benthic.ops.linear_cross_entropy"]
    monkeypatch.setattr(loss_module, "_BLOCK_ELEMENTS", {"cpu": 1 << logits})
    monkeypatch.setattr(playback, "LOGITS_AT_A_TIME", 1 << logits)
    config = ModelConfig(**fields)
    memory = training_memory(config, training)
    states = sum(memory.by_part[part] for part in ("weights", "master weights", "moments"))
    assert memory.allocated - states == pytest.approx(_peak_of_real_step(config, training, tmp_path), rel=0.02)


def _peak_of_real_step(config: ModelConfig, training: Training, folder: Path) -> int:
    """Most bytes alive at once in the second step, beyond what was alive before it."""
    model = LanguageModel(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    if training.recomputation == "layer":
        for layer in model.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    optimizer = Optimizer(model, OptimizerConfig())
    stream = torch.Generator().manual_seed(0)
    shape = (training.micro_batch * training.micro_batches, training.sequence_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=stream)
    _step(model, optimizer, tokens, training)
    optimizer.zero_gradients()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _step(model, optimizer, tokens, training)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    alive = highest = 0
    for event in sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"]):
        alive += event["args"]["Bytes"]
        highest = max(highest, alive)
    return highest


def _step(model: LanguageModel, optimizer: Optimizer, tokens: torch.Tensor, training: Training) -> None:
    scale = Scale(tokens[:, 1:].numel(), len(tokens))
    for rows in tokens.split(training.micro_batch):
        losses(model, Batch(rows, torch.zeros_like(rows)), scale, False, 0.3, BalanceConfig()).total.backward()
    optimizer.step(1e-4, joint_norm(optimizer.gradient_norms()))

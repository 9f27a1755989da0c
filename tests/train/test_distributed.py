"""A run on several ranks is the run of one process: losses, norms, loads, biases, validation, and what is saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from benthic.config.parallel import ParallelConfig
from benthic.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    LoggingConfig,
    SamplingConfig,
    TrainConfig,
)
from benthic.data import Batch
from benthic.model.initialisation import initialise
from benthic.parallel.placement import before_backward, parts
from benthic.parallel.world import joined
from benthic.train.distributed import build_model
from benthic.train.loss import Scale, losses
from benthic.train.run import run
from tests.parallel.processes import on_ranks
from tests.train.small import small_run

pytestmark = pytest.mark.slow

LAYOUTS = [
    (2, "fsdp=2"),
    (2, "fsdp=2,ep=2"),
    (2, "fsdp=2,zero=1,ep=2"),
    (4, "fsdp=4,ep=2"),
    (4, "dp=2,fsdp=2,ep=4"),
    (4, "dp=2,fsdp=2,zero=2,ep=2"),
    (2, "tp=2,ep=2"),
    (4, "tp=2,fsdp=2,zero=1"),
    (2, "cp=2,ep=2"),
    (4, "dp=2,cp=2,zero=0,ep=4"),
    (4, "cp=2,tp=2,ep=4"),
]


def a_run(layout: str = "") -> TrainConfig:
    return small_run(
        steps=10,
        batch=BatchConfig(sequences=8, micro_sequences=1),
        balance=BalanceConfig(alpha=1e-2, device_alpha=2e-2, communication_alpha=1e-2, reference_tokens=64),
        checkpoint=CheckpointConfig(every=5, keep=None, export_weights="fp32"),
        logging=LoggingConfig(every=1, routing_every=1),
        sampling=SamplingConfig(every=5, prompts=("sort 3 1",), max_tokens=4),
        parallel=ParallelConfig.parse(layout),
    )


def train(config: TrainConfig, folder: Path, resume: bool = False) -> int:
    torch.set_num_threads(1)
    return run(config, folder, resume).step


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(a_run(), folder)
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MEASURED = {"loss", "mtp_loss", "balance_loss", "grad_norm", "val_loss", "ema_val_loss", "bits_per_byte"}
COUNTED = ("step", "tokens", "lr", "max_violation", "dead_experts", "mtp_acceptance", "max_violation_global")


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_ten_updates_on_several_ranks_are_those_of_one_process(alone, tmp_path, size, layout):
    assert on_ranks(size, train, a_run(layout), tmp_path / "run") == [10] * size
    expected, found = rows(alone), rows(tmp_path / "run")
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert {name: other.get(name) for name in COUNTED} == {name: one.get(name) for name in COUNTED}
        for name in MEASURED & one.keys():
            assert other.get(name) == pytest.approx(one.get(name), rel=1e-5), (name, one["step"])
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    weights = load_file(alone / "model" / "model.safetensors")
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert weights.keys() == written.keys()
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, written[name])
        torch.testing.assert_close(written[name], weight, rtol=1e-3, atol=1e-5)


def weights_left_whole(layout: str) -> list[bool]:
    """After each of two micro-batches: whether the layers' weights are still whole."""
    config = a_run(layout)
    batch = Batch(torch.ones(1, 17, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.int64))
    found = []
    with joined(config.parallel, config.model, torch.device("cpu")) as world:
        model, _ = build_model(config, world, torch.device("cpu"))
        initialise(model, 0, parts(config.model, world))
        for is_last in (False, True):
            before_backward(model, is_last, world)
            losses(model, batch, Scale(32, 2), False, 0.3, config.balance, world).total.backward()
            found.append(not isinstance(model.model.layers[0].input_layernorm.weight, DTensor))
    return found


@pytest.mark.parametrize(("layout", "whole"), [("fsdp=2", False), ("fsdp=2,zero=2", True), ("fsdp=2,zero=1", True)])
def test_below_zero_3_weights_stay_gathered_until_the_last_micro_batch(layout, whole):
    assert on_ranks(2, weights_left_whole, layout) == [[whole, False]] * 2


@pytest.mark.parametrize(("size", "layout"), [(2, "fsdp=2,ep=2"), (4, "fsdp=4,ep=2")])
def test_a_bfloat16_run_on_several_ranks_stays_near_that_of_one_process(tmp_path, size, layout):
    def narrow(layout: str) -> TrainConfig:
        return a_run(layout).replace(steps=6, precision={"compute": "bfloat16"})

    on_ranks(1, train, narrow(""), tmp_path / "alone")
    on_ranks(size, train, narrow(layout), tmp_path / "run")
    expected, found = rows(tmp_path / "alone"), rows(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-3)
    for one, other in zip(expected, found, strict=True):
        for name in ("loss", "val_loss"):
            assert other.get(name) == (one.get(name) and pytest.approx(one[name], rel=2e-2))


@pytest.mark.parametrize("recomputation", ["up_projections", "layer"])
def test_layers_computed_again_exchange_again_and_change_nothing(alone, tmp_path, recomputation):
    config = a_run("fsdp=4,ep=2").replace(memory={"recomputation": recomputation}, steps=4)
    on_ranks(4, train, config, tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in rows(alone) if "loss" in row][:4], rel=1e-5)

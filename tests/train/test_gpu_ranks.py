"""Two GPUs, over NCCL, are one: losses and norms under every kind of layout, what they save, and that an update waits
for nothing but the lengths of messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benthic.config.parallel import ParallelConfig
from benthic.config.train import BatchConfig, CheckpointConfig, EvaluationConfig, LoggingConfig, TrainConfig
from benthic.model.initialisation import initialise
from benthic.parallel.placement import parts
from benthic.parallel.world import joined
from benthic.train.distributed import build_model, own_device
from benthic.train.optimizer import Optimizer
from benthic.train.run import run
from benthic.train.schedule import Place
from benthic.train.step import finish, launch
from tests.parallel import processes
from tests.parallel.processes import on_ranks
from tests.train.test_distributed import rows
from tests.train.test_gpu import host_batch, wide_run
from tests.train.test_pipeline import train_each

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

KINDS = {
    "experts": ["fsdp=2,ep=2", "fsdp=2", "fsdp=2,zero=1,ep=2", "dp=2"],
    "pieces": ["tp=2,ep=2", "tp=2", "cp=2,ep=2"],
    "stages": ["pp=2", "pp=2,schedule=zb1p", "pp=2,schedule=dualpipev", "pp=2,schedule=interleaved,vp=2"],
}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Kernels are compiled at their first use."""
    monkeypatch.setattr(processes, "SECONDS", 240)


def a_run(layout: str = "", **changes) -> TrainConfig:
    """Four main layers, so that four stages have one each; saved beside training."""
    settings = dict(
        steps=4,
        batch=BatchConfig(sequences=8, micro_sequences=1),
        checkpoint=CheckpointConfig(every=2, asynchronous=True, export_weights="fp32"),
        evaluation=EvaluationConfig(every=4, max_tokens=200, final_max_tokens=200, micro_sequences=4),
        logging=LoggingConfig(every=1),
        parallel=ParallelConfig.parse(layout),
    )
    config = wide_run(**(settings | changes))
    return config.replace(model=config.model.replace(num_hidden_layers=4))


def assert_near(alone: Path, folder: Path, layout: str) -> None:
    for one, other in zip(rows(alone), rows(folder), strict=True):
        for name, near in (("loss", 1e-2), ("mtp_loss", 1e-2), ("grad_norm", 5e-2), ("val_loss", 1e-2)):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=near), (layout, name, one["step"])


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_train_as_one_gpu_does(kind, tmp_path):
    run(a_run(), tmp_path / "alone")
    on_ranks(2, train_each, [a_run(layout) for layout in KINDS[kind]], tmp_path)
    for index, layout in enumerate(KINDS[kind]):
        assert_near(tmp_path / "alone", tmp_path / str(index), layout)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="FP8 needs a Hopper GPU"
)
def test_float8_and_recomputation_train_as_on_one_gpu(tmp_path):
    changes = {"precision": {"compute": "float8"}, "memory": {"recomputation": "up_projections"}}
    layouts = ["fsdp=2,ep=2", "pp=2,schedule=dualpipev"]
    run(a_run(**changes), tmp_path / "alone")
    on_ranks(2, train_each, [a_run(layout, **changes) for layout in layouts], tmp_path)
    for index, layout in enumerate(layouts):
        assert_near(tmp_path / "alone", tmp_path / str(index), layout)


def test_a_saved_state_of_two_gpus_goes_on_on_one(tmp_path):
    on_ranks(2, train_each, [a_run("fsdp=2,ep=2", steps=2)], tmp_path)
    run(a_run(), tmp_path / "alone")
    run(a_run(), tmp_path / "0", resume=True)
    assert_near(tmp_path / "alone", tmp_path / "0", "fsdp=2,ep=2, then one")


def launched_without_waiting(layout: str, folder: Path) -> float:
    """The loss of an update that was launched while any wait for the GPU that torch can see is an error."""
    config, device = a_run(layout), own_device("cuda")
    with joined(config.parallel, config.model, device) as world:
        model, _ = build_model(config, world, device)
        initialise(model, 0, parts(config.model, world))
        optimizer = Optimizer(model, config.optimizer, world=world)
        for count in (1, 2):
            launched = launch(model, optimizer, host_batch(count), Place(count, 0, 9), config, world=world)
            finish(launched, folder, world)
        try:
            torch.cuda.set_sync_debug_mode("error")
            launched = launch(model, optimizer, host_batch(3), Place(3, 0, 9), config, world=world)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return finish(launched, folder, world).loss


@pytest.mark.parametrize("layout", ["fsdp=2,ep=2", "tp=2,ep=2", "cp=2,ep=2"])
def test_an_update_waits_for_lengths_of_messages_alone(layout, tmp_path):
    first, second = on_ranks(2, launched_without_waiting, layout, tmp_path)
    assert first == second > 0

"""What only a GPU can show: that nothing waits inside an update, that runs resume exactly, that off-load changes
nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benthic.config.train import OptimizerConfig, TrainConfig
from benthic.data import Batch
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.train.optimizer import Optimizer
from benthic.train.recomputation import recompute
from benthic.train.run import run
from benthic.train.schedule import Place
from benthic.train.state import complete_states
from benthic.train.step import finish, launch
from tests.train.small import small_model, small_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wide_run(**changes) -> TrainConfig:
    """Widths that grouped products take in bfloat16: whole 16 bytes."""
    model = small_model(hidden_size=64, moe_intermediate_size=32, intermediate_size=64)
    return small_run(**({"model": model, "device": "cuda", "precision": {"compute": "bfloat16"}} | changes))


def host_batch(seed):
    tokens = torch.randint(0, 320, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.zeros_like(tokens))


# The first call of a process warns, and sets the mode all the same: an error there would leave it set.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputation", ["none", "up_projections", "layer"])
def test_an_update_waits_for_nothing_before_its_end(recomputation, moments, tmp_path):
    config = wide_run()
    model = LanguageModel(config.model, "cuda", torch.bfloat16)
    initialise(model, 0)
    recompute(model, recomputation)
    optimizer = Optimizer(model, config.optimizer, moments)
    for count in (1, 2):
        launched = launch(model, optimizer, host_batch(count), Place(count, 64 * count, 9), config)
        finish(launched, tmp_path)
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = launch(model, optimizer, host_batch(3), Place(3, 192, 9), config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finish(launched, tmp_path).loss > 0


def test_an_update_is_read_while_the_next_is_computed(tmp_path):
    config = wide_run()
    model = LanguageModel(config.model, "cuda", torch.bfloat16)
    initialise(model, 0)
    optimizer = Optimizer(model, config.optimizer)
    launched = launch(model, optimizer, host_batch(1), Place(1, 0, 9), config)
    torch.cuda._sleep(1 << 31)  # about a second of the next update
    behind = torch.cuda.current_stream().record_event()
    done = finish(launched, tmp_path)
    assert sum(done.loads[1].tolist()) == 4 * 16 * 2
    assert not behind.query()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": {"compute": "bfloat16", "moments": "bfloat16"}},
        {"memory": {"recomputation": "up_projections"}},
        {"memory": {"offload_optimizer": True, "offload_average": True}},
        {"memory": {"offload_optimizer": True}},
        {"precision": {"compute": "float32"}},
    ],
    ids=["float32 moments", "bfloat16 moments", "recomputation", "off-load", "optimizer off-load", "float32"],
)
def test_a_run_resumes_bit_for_bit(changes, tmp_path):
    config = wide_run(steps=7, **changes)
    run(config, tmp_path / "whole")
    run(config.replace(steps=4), tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    assert_same_states(tmp_path / "whole", tmp_path / "run")


def test_off_load_and_recomputation_change_no_weight(tmp_path):
    run(wide_run(steps=5), tmp_path / "plain")
    for name, memory in {
        "offload": {"offload_optimizer": True, "offload_average": True},
        "up_projections": {"recomputation": "up_projections"},
        "layer": {"recomputation": "layer"},
    }.items():
        run(wide_run(steps=5, memory=memory), tmp_path / name)
        # An average is moved by the processor's arithmetic there, which may round otherwise.
        assert_same_states(tmp_path / "plain", tmp_path / name, files=("weights", "moments"))


def assert_same_states(folder, other, files=("weights", "moments", "average")):
    newest = [complete_states(one / "checkpoints")[-1] for one in (folder, other)]
    for file in files:
        tensors, others = (load_file(one / f"{file}.safetensors") for one in newest)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), f"{file}/{name}"


def test_an_update_that_is_not_finite_changes_nothing(tmp_path):
    config = wide_run()
    model = LanguageModel(config.model, "cuda", torch.bfloat16)
    initialise(model, 0)
    optimizer = Optimizer(model, OptimizerConfig())
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = {name: one.clone() for name, one in (model.state_dict() | optimizer.masters).items()}
    launched = launch(model, optimizer, host_batch(1), Place(1, 0, 9), config)
    launched.arrived.synchronize()
    assert not launched.numbers[-1]
    for name, one in (model.state_dict() | optimizer.masters).items():
        assert torch.equal(one, before[name]), name

"""States cross layouts: what any number of ranks saved, any other number reads back, bit for bit, and goes on with."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from benthic.config.parallel import ParallelConfig
from benthic.config.train import CheckpointConfig, EvaluationConfig, TrainConfig
from benthic.errors import BenthicError
from benthic.parallel.placement import part
from benthic.parallel.world import joined
from benthic.train import sharded_state
from benthic.train import trainer as trainer_module
from benthic.train.distributed import stage_layers
from benthic.train.folder import RunFolder
from benthic.train.run import run
from benthic.train.trainer import Trainer
from tests.parallel.processes import on_ranks
from tests.train.small import small_model, small_run

pytestmark = pytest.mark.slow

UPDATES = 3
STAGES = "fsdp=2,zero=1,ep=2,pp=2,schedule=zbv"


def a_run(layout: str, steps: int = UPDATES) -> TrainConfig:
    # A vocabulary and widths that do not come out even over ranks: some hold less, some nothing.
    return small_run(
        steps=steps,
        model=small_model(num_hidden_layers=3, vocab_size=322, hidden_size=36, moe_intermediate_size=12),
        batch={"sequences": 4, "micro_sequences": 1},
        evaluation=EvaluationConfig(every=100, max_tokens=100, final_max_tokens=100),
        checkpoint=CheckpointConfig(every=UPDATES, keep=None, asynchronous=bool(layout)),
        parallel=ParallelConfig.parse(layout),
    )


def train(config: TrainConfig, folder: Path, resume: bool = False) -> None:
    torch.set_num_threads(1)
    run(config, folder, resume)


Blocks = dict[str, tuple[tuple[slice, ...], torch.Tensor]]


def restored(config: TrainConfig, folder: Path) -> Blocks:
    """The blocks that a rank of this layout holds after reading the newest state, and where they lie."""
    with joined(config.parallel, config.model, torch.device("cpu"), stage_layers(config)) as world:
        trainer = Trainer(config, RunFolder(folder), world)
        trainer.restore()
        return blocks_of(trainer)


def first_weights(config: TrainConfig, folder: Path) -> Blocks:
    """Those that it begins with."""
    with joined(config.parallel, config.model, torch.device("cpu"), stage_layers(config)) as world:
        with world.leader_first():
            folder.mkdir(exist_ok=True)
        return blocks_of(Trainer(config, RunFolder(folder), world))


def blocks_of(trainer: Trainer) -> Blocks:
    found = trainer.weights() | trainer.optimizer.moments()
    found |= {f"average.{name}": one for name, one in trainer.average.tensors.items()}
    rows = trainer._states
    place = {name: part(rows._row(name.removeprefix("average.")), trainer.world).block for name in found}
    return {name: (place[name], one.clone()) for name, one in found.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs saved by layouts, and the blocks of each on one process, which are the wholes."""
    made = {}
    for layout, ranks in (("", 1), ("fsdp=4,ep=2", 4), (STAGES, 4), ("fsdp=2,tp=2", 4)):
        folder = tmp_path_factory.mktemp("saved") / "run"
        on_ranks(ranks, train, a_run(layout), folder)
        made[layout] = folder, {name: one for name, (_, one) in on_ranks(1, restored, a_run(""), folder)[0].items()}
    return made


@pytest.mark.parametrize(
    ("before", "ranks", "after"),
    [
        ("", 2, "fsdp=2,ep=2"),
        ("", 4, "dp=2,fsdp=2,ep=4"),
        ("fsdp=4,ep=2", 2, "fsdp=2,zero=1"),
        ("fsdp=4,ep=2", 3, "fsdp=3"),
        ("fsdp=4,ep=2", 4, "fsdp=4,ep=4"),
        ("fsdp=4,ep=2", 4, "dp=4"),
        ("fsdp=4,ep=2", 4, "cp=2,tp=2,ep=2"),
        ("fsdp=2,tp=2", 2, "fsdp=2,ep=2"),
        ("", 2, "pp=2"),
        ("fsdp=4,ep=2", 4, "pp=4"),
        (STAGES, 2, "fsdp=2"),
        (STAGES, 2, "pp=2,schedule=interleaved,vp=2"),
    ],
)
def test_another_layout_reads_the_same_bits(saved, before, ranks, after):
    folder, wholes = saved[before]
    covered = {name: torch.zeros(whole.shape, dtype=torch.bool) for name, whole in wholes.items()}
    for blocks in on_ranks(ranks, restored, a_run(after), folder):
        for name, (block, one) in blocks.items():
            assert torch.equal(one, wholes[name][block]), name
            covered[name][block] = True
    assert all(seen.all() for seen in covered.values())


def test_what_is_cut_two_ways_is_put_together_as_it_was(saved):
    whole, cut = saved[""][1], saved["fsdp=2,tp=2"][1]
    assert whole.keys() == cut.keys()
    for name, one in whole.items():
        torch.testing.assert_close(cut[name], one, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_under_another_layout_as_it_would_have_alone(tmp_path, saved):
    layouts = {"spread": "fsdp=2,ep=2", "staged": "pp=2", "cut": "tp=2", "stretched": "cp=2,ep=2"}
    for name in ("alone", *layouts):
        shutil.copytree(saved[""][0], tmp_path / name)
    on_ranks(1, train, a_run("", 6), tmp_path / "alone", True)
    expected = last_row(tmp_path / "alone")
    for name, layout in layouts.items():
        on_ranks(2, train, a_run(layout, 6), tmp_path / name, True)
        found = last_row(tmp_path / name)
        assert found["step"] == expected["step"] == 6
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5), name
        assert found["max_violation_global"] == expected["max_violation_global"], name


@pytest.mark.parametrize("layout", [STAGES, "fsdp=2,tp=2"])
def test_a_run_of_stages_or_of_pieces_goes_on_alone_as_it_would_have(tmp_path, saved, layout):
    ends = []
    for name, here, ranks in (("spread", layout, 4), ("alone", "", 1)):
        shutil.copytree(saved[layout][0], tmp_path / name)
        on_ranks(ranks, train, a_run(here, 5), tmp_path / name, True)
        ends.append(last_row(tmp_path / name))
    assert ends[1]["val_loss"] == pytest.approx(ends[0]["val_loss"], rel=1e-5)
    assert ends[1]["ema_val_loss"] == pytest.approx(ends[0]["ema_val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, "pp=2,schedule=zbv"), (3, "fsdp=3"), (4, "fsdp=4,ep=2"), (4, "cp=2,tp=2,ep=2")]
)
def test_a_run_begins_with_another_model_s_weights_on_any_layout(tmp_path, saved, ranks, layout):
    source = saved[""][0] / "model"

    def begun(layout: str) -> TrainConfig:
        config = a_run(layout)
        data = config.data.replace(tokenizer=str(source))
        return config.replace(data=data, start_from=str(source))

    (whole,) = on_ranks(1, first_weights, begun(""), tmp_path / "alone")
    for blocks in on_ranks(ranks, first_weights, begun(layout), tmp_path / "run"):
        for name, (block, one) in blocks.items():
            assert torch.equal(one, whole[name][1][block]), name


def last_row(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_finished_run_of_one_process_is_exported_by_several(tmp_path, saved):
    folder = tmp_path / "run"
    shutil.copytree(saved[""][0], folder)
    written = (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    on_ranks(2, train, a_run("fsdp=2"), folder, True)
    assert (folder / "model" / "model.safetensors").read_bytes() == written


def lost_in_reading(config: TrainConfig, folder: Path) -> str:
    def closed(*_, **__):
        raise RuntimeError("[gloo] Connection closed by peer")

    sharded_state.dcp.load = closed
    try:
        restored(config, folder)
    except (BenthicError, RuntimeError) as error:
        return str(error)
    return "nothing"


def test_a_rank_that_dies_while_states_are_read_does_not_make_them_unreadable(saved):
    folder, _ = saved["fsdp=4,ep=2"]
    told = on_ranks(2, lost_in_reading, a_run("fsdp=2"), folder)
    closed = "[gloo] Connection closed by peer"
    assert sorted(told)[0] == closed
    assert sorted(told)[1].endswith(f"stopped because another did: {closed}")


def restored_without_seeing(config: TrainConfig, folder: Path) -> int:
    """Rank 1's host does not list the states yet."""
    if os.environ["RANK"] == "1":
        trainer_module.newest_step = lambda checkpoints: -1
    with joined(config.parallel, config.model, torch.device("cpu")) as world:
        trainer = Trainer(config, RunFolder(folder), world)
        trainer.restore()
        return trainer.step


def test_all_ranks_go_on_from_the_state_that_rank_0_sees(saved):
    assert on_ranks(2, restored_without_seeing, a_run("fsdp=2"), saved[""][0]) == [UPDATES, UPDATES]

"""A run in a pipeline is the run of one process under every schedule: losses, norms, loads, biases, validation; what it
cannot do is said."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benthic.config.parallel import ParallelConfig
from benthic.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    Phase,
    Schedule,
    TrainConfig,
)
from benthic.errors import ConfigError
from benthic.train.distributed import check_batches, check_pipeline, stage_layers
from tests.parallel.processes import on_ranks
from tests.train.small import small_model, small_run
from tests.train.test_distributed import COUNTED, MEASURED, rows, train

SCHEDULES = [
    "schedule=1f1b",
    "schedule=gpipe",
    "schedule=interleaved,vp=2",
    "schedule=zb1p",
    "schedule=zb1p,vp=2",
    "schedule=zbv",
    "schedule=dualpipev",
]
WITH_OTHERS = [
    "fsdp=2,zero=1,pp=2",
    "fsdp=2,zero=1,ep=2,pp=2,schedule=dualpipev",
    "dp=2,ep=2,pp=2,schedule=interleaved,vp=2",
    "pp=4,schedule=1f1b",
]


def a_run(layout: str = "", **changes) -> TrainConfig:
    settings = dict(
        steps=10,
        # Two prediction layers: the second reads what the first says, so both are on the last stage.
        model=small_model(num_hidden_layers=4, num_nextn_predict_layers=2),
        batch=BatchConfig(sequences=8, micro_sequences=1),
        balance=BalanceConfig(alpha=1e-2, device_alpha=2e-2, communication_alpha=1e-2, reference_tokens=64),
        evaluation=EvaluationConfig(every=10, max_tokens=100, final_max_tokens=100, micro_sequences=4),
        checkpoint=CheckpointConfig(every=10, export_weights="fp32"),
        logging=LoggingConfig(every=1),
        parallel=ParallelConfig.parse(layout),
    )
    return small_run(**(settings | changes))


def train_each(configs: list[TrainConfig], folder: Path) -> None:
    """One run after another: processes start once, and meet under another name each time."""
    for index, config in enumerate(configs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
        train(config, folder / str(index))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(a_run(), folder)
    return folder


def assert_same_run(alone: Path, folder: Path, layout: str) -> None:
    expected, found = rows(alone), rows(folder)
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        at = layout, one["step"]
        assert {name: other.get(name) for name in COUNTED} == {name: one.get(name) for name in COUNTED}, at
        for name in MEASURED & one.keys():
            assert other.get(name) == pytest.approx(one.get(name), rel=1e-5), (name, *at)
    weights, written = (load_file(one / "model" / "model.safetensors") for one in (alone, folder))
    assert weights.keys() == written.keys()
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, written[name]), (layout, name)
        torch.testing.assert_close(written[name], weight, rtol=1e-3, atol=1e-5, msg=f"{layout}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("schedules", [SCHEDULES[:4], SCHEDULES[4:]])
def test_ten_updates_under_each_schedule_are_those_of_one_process(alone, tmp_path, schedules):
    layouts = [f"pp=2,{schedule}" for schedule in schedules]
    pairs = BatchConfig(sequences=8, micro_sequences=2)
    on_ranks(2, train_each, [a_run(layout, batch=pairs) for layout in layouts], tmp_path)
    for index, layout in enumerate(layouts):
        assert_same_run(alone, tmp_path / str(index), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [WITH_OTHERS[:2], WITH_OTHERS[2:]])
def test_ten_updates_of_a_pipeline_among_other_axes_are_those_of_one_process(alone, tmp_path, layouts):
    on_ranks(4, train_each, [a_run(layout) for layout in layouts], tmp_path)
    for index, layout in enumerate(layouts):
        assert_same_run(alone, tmp_path / str(index), layout)


@pytest.mark.slow
def test_what_is_computed_again_or_in_narrow_numbers_is_what_one_process_computes(alone, tmp_path):
    configs = [
        a_run("pp=2", memory={"recomputation": "layer"}, steps=3),
        a_run("pp=2,schedule=dualpipev", memory={"recomputation": "up_projections"}, steps=3),
        a_run("pp=2,schedule=zb1p", precision={"compute": "bfloat16"}, steps=3),
        a_run("pp=2,schedule=zbv", precision={"compute": "float8"}, steps=3),
    ]
    on_ranks(2, train_each, configs, tmp_path)
    expected = [row["loss"] for row in rows(alone) if "loss" in row][:3]
    for index, near in enumerate((1e-5, 1e-5, 1e-2, 3e-2)):
        found = [row["loss"] for row in rows(tmp_path / str(index)) if "loss" in row]
        assert found == pytest.approx(expected, rel=near), configs[index].parallel


@pytest.mark.slow
def test_gradients_that_a_schedule_splits_off_reach_the_masters_of_a_rank_s_own_experts(tmp_path):
    changes = dict(steps=2, precision={"compute": "bfloat16"})
    schedules = ("1f1b", "zb1p", "dualpipev")
    configs = [a_run(f"fsdp=2,zero=1,ep=2,pp=2,schedule={schedule}", **changes) for schedule in schedules]
    train(a_run(**changes), tmp_path / "alone")
    on_ranks(4, train_each, configs, tmp_path)
    expected = [row["grad_norm"] for row in rows(tmp_path / "alone") if "loss" in row]
    for index, schedule in enumerate(schedules):
        found = [row["grad_norm"] for row in rows(tmp_path / str(index)) if "loss" in row]
        assert found == pytest.approx(expected, rel=1e-2), schedule


def test_stages_are_cut_by_what_layers_cost_and_prediction_layers_stay_together():
    for layout in ("pp=2", "pp=4", "pp=2,schedule=dualpipev"):
        stages = stage_layers(a_run(layout))
        assert [layer for stage in stages for layer in stage] == list(range(6))
        assert {4, 5} <= set(stages[-1])
    # One wide head outweighs layers this narrow, so the last stage gets fewer of them.
    assert len(stage_layers(a_run("pp=2"))[0]) > 3


def test_completions_during_a_pipeline_s_run_are_refused():
    with pytest.raises(ConfigError) as error:
        check_pipeline(a_run("pp=2", sampling={"prompts": ("a",)}))
    assert str(error.value) == (
        "parallel.pipeline is 2, and sampling.prompts asks for completions during the run: no rank of a pipeline has "
        "the whole model\n"
        "hint: leave sampling.prompts empty; benthic generate completes text with the finished model"
    )


def test_a_batch_that_does_not_fill_the_pipeline_is_refused():
    with pytest.raises(ConfigError) as error:
        check_batches(a_run("pp=4", batch=BatchConfig(sequences=4, micro_sequences=2)))
    assert str(error.value) == (
        "2 micro-batches a rank do not fill schedule '1f1b', which needs 4 or more\n"
        "hint: use a batch of at least 8 sequences"
    )


def test_a_batch_that_fills_the_pipeline_only_when_it_has_grown_is_refused():
    growing = Schedule(peak=8, start=0.25, phases=(Phase(shape="linear", until=4, unit="steps"),))
    with pytest.raises(ConfigError, match="2 micro-batches a rank do not fill schedule 'dualpipev', which needs 4"):
        check_batches(a_run("pp=2,schedule=dualpipev", batch=BatchConfig(sequences=growing)))

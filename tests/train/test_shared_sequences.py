"""Ranks that have parts of the same sequences: whatever else a run chooses, three updates are those of one process."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benthic.config.parallel import ParallelConfig
from benthic.config.train import BalanceConfig, BatchConfig, LoggingConfig, TrainConfig
from benthic.errors import ConfigError
from benthic.parallel.world import joined
from benthic.train.distributed import build_model, check_batches, entered
from benthic.train.trainer import Trainer
from tests.parallel.processes import on_ranks
from tests.train.small import small_model, small_run

pytestmark = pytest.mark.slow

HEADS = dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
CHOICES = {
    "documents kept apart": dict(data=small_run().data.replace(mask_documents=True)),
    "up-projections made again": dict(memory={"recomputation": "up_projections"}),
    "layers made again": dict(memory={"recomputation": "layer"}),
    "queries not compressed, shared head, no shared expert": dict(
        model=small_model(q_lora_rank=None, tie_word_embeddings=True, n_shared_experts=0)
    ),
    "two predictions, balance over what was selected": dict(
        model=small_model(num_nextn_predict_layers=2), balance=BalanceConfig(auxiliary_loss="expert", alpha=1e-2)
    ),
    "balance over micro-batches, bfloat16": dict(
        balance=BalanceConfig(auxiliary_loss="batch", alpha=1e-2), precision={"compute": "bfloat16"}
    ),
    "FP8": dict(model=small_model(**HEADS, moe_intermediate_size=32), precision={"compute": "float8"}),
    "no experts": dict(model=small_model(first_k_dense_replace=3)),
}

NEAR = {"float32": 1e-5, "bfloat16": 5e-3, "float8": 5e-2}


def a_run(layout: str, **changes) -> TrainConfig:
    settings = dict(
        steps=3,
        batch=BatchConfig(sequences=4, micro_sequences=2),
        balance=BalanceConfig(alpha=1e-2, device_alpha=2e-2, communication_alpha=1e-2),
        logging=LoggingConfig(every=1, routing_every=1),
        parallel=ParallelConfig.parse(layout),
        precision={"compute": "float32"},
    )
    return small_run(**(settings | changes))


def rows(configs: dict[str, TrainConfig], folder: Path) -> dict[str, list[dict]]:
    """The metrics of some runs, one after another on the same ranks."""
    torch.set_num_threads(1)
    first = next(iter(configs.values()))
    found = {}
    with joined(first.parallel, first.model, torch.device("cpu")) as world:
        for name, config in configs.items():
            with entered(folder / name, config, False, world) as place:
                trainer = Trainer(config, place, world)
                for _ in range(config.steps):
                    trainer.make_update(Mock(), False)
            world.wait_for_all()
            lines = (folder / name / "metrics.jsonl").read_text().splitlines()
            found[name] = [json.loads(line) for line in lines]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    configs = {name: a_run("", **changes) for name, changes in CHOICES.items()}
    return on_ranks(1, rows, configs, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize(("size", "layout"), [(2, "tp=2"), (4, "cp=2,tp=2")])
def test_whatever_a_run_chooses_its_updates_are_those_of_one_process(alone, tmp_path, size, layout):
    configs = {name: a_run(layout, **changes) for name, changes in CHOICES.items()}
    for name, found in on_ranks(size, rows, configs, tmp_path)[0].items():
        near = NEAR[configs[name].precision.compute]
        for one, other in zip(alone[name], found, strict=True):
            for measured in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
                expected = one[measured]
                assert other[measured] == (expected and pytest.approx(expected, rel=near)), (name, measured)
            if configs[name].precision.compute == "float32":
                assert other["max_violation"] == one["max_violation"], name


@pytest.mark.parametrize(
    ("layout", "length", "told"),
    [
        ("cp=2", 18, "context parallelism over 2 ranks cuts it into 4 pieces, which must come out even"),
        ("cp=2,tp=4", 20, "a rank's 10 positions of it are split over 4 tensor ranks, which must come out even"),
        ("cp=4,tp=2", 8, "each of 4 context and 2 tensor ranks has 1 positions; 1 prediction layers need more"),
    ],
)
def test_sequences_that_do_not_divide_are_refused(layout, length, told):
    config = a_run(layout, data=small_run().data.replace(sequence_length=length))
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_batches(config)


def test_pieces_too_narrow_for_fp8_are_refused():
    world = Mock(size=2, layout=ParallelConfig(tensor=2))
    with pytest.raises(
        ConfigError,
        match=r"leaves a rank 8 of the 16 rows of .*shared_experts.gate_proj.weight; FP8 needs a multiple of 16",
    ):
        build_model(a_run("tp=2", precision={"compute": "float8"}), world, torch.device("cpu"))

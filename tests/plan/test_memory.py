"""Training memory: additive, monotone, conserved by sharding, and V3's own run in 80 GB."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import DEVICES
from benthic.plan.memory import training_memory
from benthic.plan.parameters import count_parameters
from benthic.plan.training import Training
from tests.plan.configs import SMALL, configs

V3 = ModelConfig.from_pretrained("deepseek-v3")
LITE = ModelConfig.from_pretrained("deepseek-v2-lite").replace(num_hidden_layers=6)
GIB = 2**30


@given(configs(), st.integers(1, 64), st.integers(1, 3), st.sampled_from(["none", "up_projections", "layer"]))
@settings(max_examples=40, deadline=None)
def test_parts_add_up_and_states_are_eighteen_bytes_a_parameter(config, length, batch, recomputation):
    memory = training_memory(config, Training(length, batch, recomputation=recomputation))
    assert sum(memory.by_part.values()) == pytest.approx(memory.total)
    assert memory.allocated < memory.total
    count = count_parameters(config)
    elements = count.total + count.mtp_unique
    biases = sum(line.value for line in memory.lines if line.name == "routing biases")
    trained = elements - biases / 4
    states = memory.by_part["weights"] + memory.by_part["master weights"] + memory.by_part["moments"] - biases
    assert states == pytest.approx(14 * trained)
    assert memory.by_part.get("gradients", 0) <= 4 * trained * (1 + 1e-9)


@given(configs(), st.integers(1, 32))
@settings(max_examples=30, deadline=None)
def test_memory_never_shrinks_when_anything_grows(config, length):
    base = training_memory(config, Training(length)).allocated
    assert training_memory(config, Training(length + 1)).allocated >= base
    assert training_memory(config, Training(length, 2)).allocated >= base
    assert training_memory(config, Training(length, micro_batches=2)).allocated >= base
    deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1)
    assert training_memory(deeper, Training(length)).allocated > base
    assert training_memory(config, Training(length, averaged_weights=True)).allocated > base


@pytest.mark.parametrize("config", [LITE, SMALL["v3"].replace(num_hidden_layers=6), SMALL["dense mha"]])
def test_more_recomputation_keeps_less(config):
    kept = [
        training_memory(config, Training(4096, 4, recomputation=how)).by_part["activations"]
        for how in ("none", "up_projections", "layer")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_states_of_all_ranks_are_those_of_one():
    training = Training(512)
    alone = training_memory(LITE, training).by_part
    for layout in (ParallelConfig(shard=8, expert=8), ParallelConfig(shard=4, expert=2), ParallelConfig(shard=8)):
        rank = training_memory(LITE, training, layout).by_part
        for part in ("master weights", "moments"):
            assert rank[part] * 8 / (8 // layout.shard) == pytest.approx(alone[part], rel=1e-9)


def test_zero_stages_shard_one_thing_after_another():
    training = Training(512, micro_batches=2)
    memory = [training_memory(LITE, training, ParallelConfig(shard=8, zero=zero)).by_part for zero in range(4)]
    assert memory[1]["moments"] == pytest.approx(memory[0]["moments"] / 8)
    assert memory[1]["gradients"] == pytest.approx(memory[0]["gradients"])
    assert memory[2]["gradients"] < memory[1]["gradients"]
    assert memory[3]["weights"] < memory[2]["weights"]


def test_experts_of_a_rank_shrink_with_expert_parallelism():
    few = training_memory(LITE, Training(512), ParallelConfig(shard=8, zero=1, expert=8))
    all_of_them = training_memory(LITE, Training(512), ParallelConfig(shard=8, zero=1))
    assert few.by_part["weights"] < 0.3 * all_of_them.by_part["weights"]


def test_context_parallelism_divides_activations():
    one = training_memory(LITE, Training(8192, 16)).by_part["activations"]
    four = training_memory(LITE, Training(8192, 16), ParallelConfig(context=4, zero=0)).by_part["activations"]
    assert four == pytest.approx(one / 4, rel=0.1)


def test_the_first_rank_of_1f1b_keeps_as_many_micro_batches_as_there_are_ranks():
    training = Training(4096, 8, micro_batches=16)
    config = LITE.replace(num_hidden_layers=8, first_k_dense_replace=0)
    alone = training_memory(config.replace(num_hidden_layers=2), Training(4096, 8)).by_part["activations"]
    piped = training_memory(config, training, ParallelConfig(pipeline=4))
    assert piped.rank == 0
    assert piped.by_part["activations"] == pytest.approx(4 * alone, rel=0.2)


def test_v3_in_the_published_layout_fits_an_h800():
    layout = ParallelConfig.parse("pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64")
    training = Training(4096, 1, 120, "fp8", bf16_moments=True, recomputation="up_projections")
    memory = training_memory(V3, training, layout)
    assert 50 * GIB < memory.total < DEVICES["h800"].memory_bytes
    # FP8 copies of weights come on top of bfloat16 ones, and save activations.
    wide = training_memory(V3, replace(training, precision="bf16"), layout)
    assert memory.by_part["weights"] > 1.5 * wide.by_part["weights"]
    assert memory.by_part["activations"] < 0.9 * wide.by_part["activations"]
    assert training_memory(V3, replace(training, recomputation="none"), layout).total > 1.3 * memory.total


def test_a_lone_micro_batch_keeps_gradients_as_their_products_wrote_them():
    alone, several = (training_memory(LITE, Training(64, micro_batches=count)).by_part["gradients"] for count in (1, 2))
    assert 1.8 * alone < several <= 2 * alone
    apart = training_memory(LITE, Training(64), ParallelConfig(shard=2, zero=0)).by_part["gradients"]
    assert apart > 1.8 * alone


def test_a_long_vocabulary_puts_the_peak_at_the_loss_and_a_lone_token_at_the_end():
    wide = SMALL["dense mha"].replace(vocab_size=50_000)
    assert training_memory(wide, Training(64, 4)).moment == "loss of head 0"
    assert training_memory(SMALL["dense mha"], Training(1)).moment == "backward of the embedding"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
        ({"sequence_length": 8, "micro_batch": -1}, "micro_batch is -1; it must be at least 1"),
        ({"sequence_length": 8, "micro_batches": 0}, "micro_batches is 0; it must be at least 1"),
        ({"sequence_length": 8, "expert_imbalance": -0.1}, "expert_imbalance is -0.1; it must be at least 0"),
        ({"sequence_length": 8, "recomputation": "some"}, "recomputation is 'some'; allowed: none, up_projections"),
        ({"sequence_length": 8, "precision": "int8"}, "precision is 'int8'; allowed: bf16, fp8, fp32"),
    ],
)
def test_wrong_training_settings_are_refused_in_words(fields, part):
    with pytest.raises(ConfigError) as error:
        Training(**fields)
    assert part in str(error.value)


def test_a_processor_pays_for_no_cuda_context_and_no_caching_allocator():
    gpu = training_memory(LITE, Training(512), device=DEVICES["h800"])
    assert gpu == training_memory(LITE, Training(512))
    assert gpu.total == pytest.approx(1.03 * gpu.allocated + 0.7 * GIB)
    cpu = training_memory(LITE, Training(512), device=DEVICES["cpu"])
    assert cpu.total == cpu.allocated == pytest.approx(gpu.allocated)
    assert not any("CUDA" in text or "allocator" in text for text in (*cpu.assumptions, *(t.name for t in cpu.lines)))


def test_every_line_explains_itself():
    memory = training_memory(LITE, Training(512))
    assert all(line.formula for line in memory.lines)
    weights = next(line for line in memory.lines if line.name == "weights")
    assert weights.formula == f"{weights.value / 2:,.0f} elements x 2 B"

"""Step time: sums, FLOPs accounted for, and what schedules, recomputation and links change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import DEVICES, MEMORY_WORKS, Rate
from benthic.plan.flops import training_flops_per_token
from benthic.plan.layer_time import Overheads
from benthic.plan.training import Training
from benthic.plan.training_time import step_time
from tests.plan.configs import configs

LITE = ModelConfig.from_pretrained("deepseek-v2-lite")
V3 = ModelConfig.from_pretrained("deepseek-v3")
H200, H800 = DEVICES["h200"], DEVICES["h800"]


@given(configs(), st.integers(1, 64), st.sampled_from(["none", "up_projections", "attention", "layer"]))
@settings(max_examples=30, deadline=None)
def test_a_step_is_the_sum_of_its_parts_and_grows_with_everything(config, length, recomputation):
    training = Training(length, recomputation=recomputation)
    step = step_time(config, training, H200)
    assert sum(step.by_part.values()) == pytest.approx(step.total)
    assert step_time(config, replace(training, micro_batch=2), H200).total > step.total
    assert step_time(config, replace(training, micro_batches=2), H200).total > step.total
    deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1)
    assert step_time(deeper, training, H200).total > step.total


def test_one_gpu_cannot_beat_its_matrix_rate():
    step = step_time(LITE, Training(4096, 4), H200)
    assert 100e12 < step.flops_per_second_per_gpu < H200.rate("matmul", "bf16").value
    per_token = training_flops_per_token(LITE, 4096)
    assert step.flops == pytest.approx(per_token * 4 * 4096)
    assert step.tokens_per_second_per_gpu == pytest.approx(step.flops_per_second_per_gpu / per_token)


def test_recomputation_takes_longer_the_more_there_is():
    steps = [
        step_time(LITE, Training(4096, 4, 8, recomputation=how), H200).total
        for how in ("none", "up_projections", "attention", "layer")
    ]
    assert steps == sorted(steps)
    assert steps[-1] > 1.15 * steps[0]


def test_faster_memory_and_links_never_slow_a_step_down():
    layout = ParallelConfig(shard=16, expert=16)
    training = Training(4096)
    slow = step_time(LITE, training, H200, layout)
    wide = replace(H200, measured_bandwidth={kind: Rate(1e13, "test") for kind in MEMORY_WORKS})
    near = replace(H200, network_bandwidth=Rate(4e11, "test"))
    assert step_time(LITE, training, wide, layout).total < slow.total
    assert step_time(LITE, training, near, layout).total < slow.total


def test_dualpipe_hides_the_exchange_that_1f1b_shows():
    training = Training(4096, 1, 120, "fp8", True, "up_projections")
    plain = ParallelConfig.parse("pp=16,fsdp=128,zero=1,ep=64")
    shown = step_time(V3, training, H800, plain, 15360, Overheads(memory_share=0.261, forwarding=True))
    dual = plain.replace(schedule="dualpipe")
    hidden = step_time(V3, training, H800, dual, 15360, Overheads(memory_share=0.261, forwarding=True))
    assert hidden.by_part["exposed communication"] < 0.4 * shown.by_part["exposed communication"]
    assert hidden.by_part["bubble"] < 0.5 * shown.by_part["bubble"]
    assert hidden.total < shown.total
    unlimited = Overheads(memory_share=0.261, forwarding=True, group_limit=False)
    free = step_time(V3, training, H800, plain, 15360, unlimited)
    assert free.by_part["exposed communication"] > 1.2 * shown.by_part["exposed communication"]


def test_backward_is_longer_than_forward_and_holds_the_weight_gradient():
    stage = step_time(LITE, Training(4096), H200).stage
    assert stage.forward < stage.backward
    assert 0 < stage.weight_gradient < stage.backward


def test_imbalance_slows_the_experts_alone():
    even = step_time(LITE, Training(4096), H200)
    uneven = step_time(LITE, Training(4096, expert_imbalance=0.5), H200)
    experts = [next(line.value for line in step.lines if line.name == "routed experts") for step in (even, uneven)]
    assert experts[1] == pytest.approx(1.5 * experts[0], rel=0.02)
    cores = [next(line.value for line in step.lines if line.name == "attention core") for step in (even, uneven)]
    assert cores[0] == cores[1]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="a batch of 7 sequences does not divide"):
        step_time(LITE, Training(4096), H200, ParallelConfig(shard=8), sequences=7)


def test_rates_and_their_sources_are_among_the_assumptions():
    text = "\n".join(step_time(LITE, Training(4096), H200).assumptions)
    assert "grouped, bf16: 675 TFLOP/s (torch F.grouped_mm" in text
    assert "memory-bound work: bytes of each kernel" in text
    assert "scatter_add kernels: 730 GB/s (index_add_ of bf16 rows, benchmarks/kernel_rates.py" in text
    assert "a kernel takes 8.2 us or longer (adding 1 to one number" in text
    assert "tiles of 128 rows" in text
    fp8 = "\n".join(step_time(V3, Training(4096, precision="fp8"), H200).assumptions)
    assert "retile kernels: 2.08 TB/s (retile_columns, all calls" in fp8
    assert "tiles of" not in fp8


def test_slow_devices_have_rates_too():
    text = "\n".join(step_time(LITE, Training(64, precision="fp32"), DEVICES["cpu"]).assumptions)
    assert "matmul, fp32: 100 GFLOP/s (assumed 50% of peak: nobody measured it)" in text
    assert "norm kernels: 20 GB/s" in text
    assert ": 0 " not in text


def test_the_memory_bound_part_is_told_by_kind_of_kernel():
    lines = {line.name: line.value for line in step_time(LITE, Training(4096, 4), H200).lines}
    kinds = [name for name in lines if name.startswith("memory-bound, ")]
    assert {"memory-bound, rows", "memory-bound, norm", "memory-bound, elementwise"} < set(kinds)
    # SwiGLU of all experts' rows, two read and one written, then more in backward.
    assert max(kinds, key=lines.__getitem__) == "memory-bound, gated"
    quantising = {line.name for line in step_time(LITE, Training(4096, 4, precision="fp8"), H200).lines} - set(lines)
    assert quantising == {
        "memory-bound, quantise",
        "memory-bound, retile",
        "memory-bound, gated_fp8",
        "weights in FP8",
    }

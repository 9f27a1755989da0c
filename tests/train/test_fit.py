"""What a run will take, and the refusal of what does not fit."""

import pytest

from benthic.errors import CapacityError
from benthic.plan.devices import find_device
from benthic.plan.flops import training_flops_per_token
from benthic.recipes import find_recipe
from benthic.train.fit import compared, plan_run, require_room, training_of

CONFIG = find_recipe("tiny")().replace(device="cpu", precision={"compute": "float32"})
GIB = 2**30


def test_the_plan_speaks_of_the_whole_run():
    plan = plan_run(CONFIG, find_device("cpu"))
    peak = CONFIG.batch.sequences.peak * CONFIG.data.sequence_length
    assert plan.step.tokens == peak
    assert plan.tokens == CONFIG.steps * peak
    assert plan.step.flops == peak * training_flops_per_token(
        CONFIG.model, CONFIG.data.sequence_length, include_mtp=True
    )
    assert plan.hours == pytest.approx(CONFIG.steps * plan.step.total / 3600)
    assert plan.fits


def test_micro_batches_and_average_reach_the_planner():
    batch = CONFIG.batch.replace(sequences=8, micro_sequences=2)
    training = training_of(CONFIG.replace(batch=batch, optimizer={"ema_decay": 0.9}), "bfloat16")
    assert (training.micro_batch, training.micro_batches, training.precision) == (2, 4, "bf16")
    assert training.averaged_weights


def test_only_a_gpu_keeps_room_for_cuda():
    on_cpu = require_room(CONFIG, "this machine", 64 * GIB)
    on_gpu = require_room(CONFIG.replace(device="cuda"), "a GPU", 64 * GIB)
    assert on_cpu.total == on_cpu.allocated
    assert on_gpu.total > on_gpu.allocated + 0.7 * GIB
    assert plan_run(CONFIG, find_device("cpu")).memory.total == on_cpu.total


def test_what_fits_passes_and_what_does_not_names_the_largest_that_does():
    needed = require_room(CONFIG, "a large machine", 64 * GIB).total
    with pytest.raises(CapacityError) as caught:
        require_room(CONFIG, "a small machine", int(needed * 0.95))
    text = str(caught.value)
    assert "a small machine has" in text
    assert "what fits: micro-batches of" in text
    assert "--batch.micro_sequences" in text
    suggested = int(text.split("micro-batches of ")[1].split(",")[0])
    smaller = CONFIG.batch.replace(sequences=suggested, micro_sequences=suggested)
    require_room(CONFIG.replace(batch=smaller), "a small machine", int(needed * 0.95))


def test_what_a_run_gives_for_memory_reaches_the_planner():
    memory = {"recomputation": "up_projections", "offload_average": True}
    config = CONFIG.replace(
        device="cuda",
        memory=memory,
        optimizer={"ema_decay": 0.9},
        precision={"compute": "float8", "moments": "bfloat16"},
    )
    training = training_of(config, "float8")
    assert (training.precision, training.recomputation) == ("fp8", "up_projections")
    assert training.bf16_moments
    assert not training.averaged_weights


def test_moments_and_masters_kept_elsewhere_take_no_room():
    config = CONFIG.replace(device="cuda", precision={"compute": "bfloat16"})
    away = config.replace(memory={"offload_optimizer": True})
    everything, rest = (require_room(one, "a GPU", 64 * GIB) for one in (config, away))
    count = plan_run(config, find_device("h200")).parameters
    assert everything.total - rest.total == pytest.approx(12 * (count.total + count.mtp_unique), rel=1e-4)
    require_room(away, "a small GPU", int(rest.total) + 1)
    with pytest.raises(CapacityError):
        require_room(config, "a small GPU", int(rest.total) + 1)


def test_the_plan_is_set_beside_what_was_measured():
    planned = require_room(CONFIG, "a large machine", 64 * GIB)
    said = compared(planned, int(planned.allocated * 1.5))
    assert "allocated at the highest moment" in said
    assert said.endswith("planned (+50.0%)")

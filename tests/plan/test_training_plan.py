"""The training half of a plan: what was asked is used, what was left open is decided and said."""

from dataclasses import replace

import pytest

from benthic.config import ModelConfig
from benthic.errors import ConfigError
from benthic.plan.memory import training_memory
from benthic.plan.operations import RECOMPUTATIONS
from benthic.plan.plan import make_plan
from benthic.plan.request import PlanRequest
from benthic.plan.training_plan import describe, explain, plan_training
from tests.plan.configs import SMALL

V3_LAYOUT = "pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64"


def preset(name):
    return ModelConfig.from_pretrained(name)


@pytest.fixture(scope="module")
def v3():
    request = PlanRequest(
        device="h800", layout=V3_LAYOUT, sequences=15360, tokens=14.8e12, recomputation="up_projections"
    )
    return plan_training(preset("deepseek-v3"), request)


def test_the_layout_asked_for_is_planned(v3):
    found = describe(v3)
    assert found["gpus"] == 2048
    assert found["micro_batches"] == 120
    assert found["tokens_per_step"] == 15360 * 4096
    assert found["precision"] == "fp8"
    assert found["recomputation"] == "up_projections"
    assert found["fits"]


def test_v3_costs_about_what_was_published(v3):
    assert v3.cost.gpu_hours == pytest.approx(2.664e6, rel=0.15)
    assert v3.cost.dollars == pytest.approx(2 * v3.cost.gpu_hours)


def test_utilisation_is_model_flops_over_peak(v3):
    seconds, tokens = v3.step.total, v3.step.tokens
    flops = 260_648_010_240 * tokens / seconds / 2048
    assert v3.utilisation == pytest.approx(flops / 989.4e12)


def test_explained_addends_add_up(v3):
    found = explain(v3)
    assert sum(one["value"] for one in found["memory"]) == pytest.approx(v3.memory.total)
    assert sum(one["value"] for one in found["step"]) == pytest.approx(v3.step.total)


def test_the_fewest_gpus_are_taken_and_half_of_them_do_not_fit():
    config = preset("deepseek-v2-lite")
    plan = plan_training(config, PlanRequest())
    assert plan.fits
    half = plan_training(config, PlanRequest(gpus=plan.layout.world // 2))
    assert not half.fits
    assert half.training.recomputation == "layer"
    assert "recomputation layer: all there is" in half.choices


def test_a_search_is_at_least_as_good_as_the_short_list():
    config = preset("deepseek-v2-lite")
    quick, searched = (
        plan_training(config, PlanRequest(gpus=8, sequences=1024, objective=objective))
        for objective in (None, "least_time")
    )
    assert searched.fits
    assert searched.step.total <= quick.step.total * (1 + 1e-9)


def test_the_least_recomputation_that_fits_is_taken():
    config = preset("olmo2-7b")
    roomy, tight = (plan_training(config, PlanRequest(gpus=gpus)) for gpus in (64, 2))
    assert roomy.training.recomputation == "none"
    assert tight.fits
    least = RECOMPUTATIONS.index(tight.training.recomputation)
    for less in RECOMPUTATIONS[:least]:
        memory = training_memory(config, replace(tight.training, recomputation=less), tight.layout)
        assert memory.total > tight.device.memory_bytes


@pytest.mark.parametrize("name", SMALL)
def test_small_models_train_on_one_gpu(name):
    plan = plan_training(SMALL[name], PlanRequest(sequence_length=32, sequences=4))
    assert plan.layout.world == 1
    assert plan.fits
    assert plan.training.micro_batches == 4


def test_json_holds_memory_and_cost():
    plan = make_plan(preset("deepseek-v2-lite"), PlanRequest(tokens=2e12, dollars_per_hour=1.5), "lite")
    assert sum(plan["memory"]["by_part"].values()) == pytest.approx(plan["memory"]["training_bytes_per_gpu"])
    assert plan["cost"]["dollars"] == pytest.approx(1.5 * plan["cost"]["gpu_hours"])
    assert sum(plan["cost"]["gpu_hours_by_part"].values()) == pytest.approx(plan["cost"]["gpu_hours"])
    assert "1.50 dollars a GPU-hour (as given)" in plan["cost"]["assumptions"]


def test_a_run_twice_as_long_costs_twice_as_much():
    config = preset("deepseek-v2-lite")
    once, twice = (plan_training(config, PlanRequest(tokens=tokens)).cost.dollars for tokens in (1e12, 2e12))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pp=3,fsdp=8,ep=3"}, "expert is 3; it must divide"),
        ({"layout": "pp=128"}, "the layout cuts the model into 128 stages, but it has only"),
        ({"layout": "xx=2"}, "unknown layout axis 'xx'"),
        ({"layout": "fsdp=8", "gpus": 16}, "layout 'fsdp=8' is for 8 GPUs, but gpus is 16"),
        ({"layout": "fsdp=8", "sequences": 12}, "a batch of 12 sequences does not divide"),
        ({"device": "a100", "precision": "fp8"}, "precision is 'fp8', which a100 lacks"),
        ({"tokens": 0}, "tokens: Input should be greater than 0 (given 0)"),
        ({"dollars_per_hour": -1}, "dollars_per_hour: Input should be greater than or equal to 0"),
        ({"recomputation": "all"}, "recomputation: Input should be 'none', 'up_projections', 'attention' or 'layer'"),
    ],
    ids=str,
)
def test_refusals_name_the_value_and_what_is_allowed(options, message):
    with pytest.raises(ConfigError) as caught:
        plan_training(preset("deepseek-v3"), PlanRequest(**options))
    assert message in str(caught.value)

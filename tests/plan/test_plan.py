"""The plan as data: fixed keys, published values, and choices that are said aloud."""

import json

import pytest
from hypothesis import given

from benthic.config import ModelConfig
from benthic.config.published import preset_names
from benthic.errors import ConfigError
from benthic.plan.plan import explain_plan, make_plan
from benthic.plan.request import PlanRequest
from tests.plan.configs import SMALL, configs, drawn

KEYS = {
    "parameters": "total active active_without_input_embedding mtp_unique mtp_stored routed shared attention dense "
    "embedding",
    "kv_cache": "kind elements_per_token bytes_per_token bytes_per_token_if",
    "flops": "forward_per_token training_per_token_causal training_per_token_full decode_per_token",
    "memory": "weights_bytes",
}


def preset(name):
    return ModelConfig.from_pretrained(name)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan_with_the_fixed_keys(name):
    plan = make_plan(preset(name), PlanRequest(), name)
    for section, keys in KEYS.items():
        assert set(keys.split()) <= set(plan[section]), section
    assert set(plan["kv_cache"]["bytes_per_token_if"]) == {"mha", "gqa", "mqa", "mla"}
    assert json.loads(json.dumps(plan)) == plan


def test_the_plan_of_v3_holds_the_published_figures():
    plan = make_plan(preset("deepseek-v3"), PlanRequest(), "deepseek-v3")
    assert plan["parameters"]["total"] == 671_026_419_200
    assert plan["parameters"]["active_without_input_embedding"] == 36_625_618_432
    assert plan["kv_cache"]["bytes_per_token"] == 70_272
    assert plan["kv_cache"]["kind"] == "mla"
    assert plan["flops"]["training_per_token_causal"] == pytest.approx(250.5e9, rel=2e-4)
    assert plan["flops"]["training_per_token_full"] == pytest.approx(281.2e9, rel=2e-4)
    assert plan["memory"]["stored_bytes"] == pytest.approx(688.6e9, rel=1e-3)


@drawn
@given(configs())
def test_any_model_has_a_plan(config):
    plan = make_plan(config, PlanRequest(context=64, gpus=1), "drawn")
    parts = ("embedding", "head", "attention", "dense", "routed", "shared", "router", "norm")
    assert sum(plan["parameters"][part] for part in parts) == plan["parameters"]["total"]
    assert plan["serving"]["fits"]


def test_what_was_left_open_is_decided_and_said():
    plan = make_plan(preset("deepseek-v3"), PlanRequest(device="a100"), "deepseek-v3")
    assert plan["serving"]["weights"] == "bf16"
    assert "weights in bf16, not in fp8 as stored: NVIDIA A100 SXM 80 GB has no fp8 arithmetic" in plan["assumptions"]
    assert plan["serving"]["gpus"] == 32
    assert "served by 32 GPUs: the smallest power of two that holds weights and cache" in plan["assumptions"]


def test_a_context_beyond_the_model_is_said():
    plan = make_plan(preset("moonlight-16b-a3b"), PlanRequest(context=10_000), "moonlight")
    assert "10,000 positions are more than the model's 8,192" in plan["assumptions"]


def test_what_does_not_fit_says_so_and_names_what_does():
    serving = make_plan(preset("deepseek-v3"), PlanRequest(gpus=4), "v3")["serving"]
    assert not serving["fits"]
    assert serving["longest_context"] == serving["largest_batch"] == 0
    assert serving["fewest_gpus"] == 16


def test_a_given_batch_is_the_one_step_shown():
    plan = make_plan(preset("deepseek-v2-lite"), PlanRequest(batch=24), "lite")
    assert [step["batch"] for step in plan["serving"]["steps"]] == [24]


@pytest.mark.parametrize("name", SMALL)
def test_the_explained_numbers_of_serving_evaluate_to_the_plan(name):
    request = PlanRequest(context=32, batch=3)
    plan = make_plan(SMALL[name], request, name)
    lines = {line["name"]: line for line in explain_plan(SMALL[name], request)["lines"]}
    for line in lines.values():
        assert eval(line["numbers"]) == pytest.approx(line["value"], rel=1e-9), line
    assert lines["longest context"]["value"] == plan["serving"]["longest_context"]
    assert lines["largest batch"]["value"] == plan["serving"]["largest_batch"]


def test_operations_add_up_to_the_step():
    config, request = preset("deepseek-v2-lite"), PlanRequest(batch=8, gpus=1)
    plan = make_plan(config, request, "lite")
    seconds = sum(one["seconds"] for one in explain_plan(config, request)["decode"])
    assert seconds == pytest.approx(plan["serving"]["steps"][0]["seconds_per_token"])


@pytest.mark.parametrize("field", ["gpus", "context", "batch", "sequence_length"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_must_be_positive(field, value):
    with pytest.raises(ConfigError, match=rf"PlanRequest: {field}: .*greater than 0 \(given {value}\)"):
        PlanRequest(**{field: value})

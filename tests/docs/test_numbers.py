"""docs/numbers.md says what the planner computes, digit for digit."""

import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.train_arms import model_config
from benthic.config import ModelConfig
from benthic.config.manifest import parameters as manifest
from benthic.plan.devices import find_device
from benthic.plan.flops import decode_flops_per_token, training_flops_per_token
from benthic.plan.kv_cache import (
    bytes_per_token_of_rank,
    cache_bytes_per_token,
    elements_per_token,
    expanded_elements_per_token,
)
from benthic.plan.memory import training_memory
from benthic.plan.parameters import count_parameters, stored_bytes, stored_format
from benthic.plan.replay import replay
from benthic.plan.training import Training
from benthic.plan.training_time import step_time

PAGE = Path(__file__).parents[2] / "docs" / "numbers.md"
TOKENS_OF_V3, HOURS_OF_V3 = 14.8e12, 2.664e6


def load(model):
    return model if isinstance(model, ModelConfig) else ModelConfig.from_pretrained(model)


def parameters(model):
    return count_parameters(load(model))


def without_vocabulary(model, which):
    count = parameters(model)
    return getattr(count, which) - count.embedding - count.head


def stored_gigabytes(model):
    config = load(model)
    return stored_bytes(config, stored_format(config)) / 1e9


def elements(model, kind=None):
    return elements_per_token(load(model), kind)


def expanded(model):
    return expanded_elements_per_token(load(model))


def cache_bytes(model, *arguments, **options):
    return cache_bytes_per_token(load(model), *arguments, **options)


def cache_bytes_of_rank(model, ranks):
    return bytes_per_token_of_rank(load(model), ranks)


def training(model, *arguments, **options):
    return training_flops_per_token(load(model), 4096, *arguments, **options) / 1e9


def core(model):
    """The causal attention term of training, GFLOP."""
    return training(model, "full") - training(model)


def decoding(model):
    return decode_flops_per_token(load(model), 4096) / 1e9


def run_teraflops(**options):
    return training("deepseek-v3", **options) * 1e9 * TOKENS_OF_V3 / (HOURS_OF_V3 * 3600) / 1e12


@cache
def predicted_run():
    return {one.name: one.predicted for one in replay().comparisons}


def replayed(name):
    return predicted_run()[name]


lite = load("deepseek-v2-lite").replace(
    num_hidden_layers=8, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True
)


def peak_gibibytes(config, length, micro_batch, **training):
    return training_memory(config, Training(length, micro_batch, **training)).allocated / 2**30


def step_milliseconds(config, length, sequences, **options):
    return 1e3 * step_time(config, Training(length, sequences, **options), find_device("h200")).total


def prediction_active(heads):
    return parameters("deepseek-v3").mtp_active + heads * parameters("deepseek-v3").embedding


prediction_layer_alone = sum(
    row.size for row in manifest(load("deepseek-v3")) if row.layer == 61 and row.part != "prediction"
)
small_moe_with_mha = load("deepseek-v2-lite").replace(
    kv_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=None, v_head_dim=None, head_dim=128
)


def rows():
    """(what, published, computed, expression) of every table row that carries an expression."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and (found := re.fullmatch(r"(.*)\| `(.+)` \|", line)):
            what, published, computed = (cell.strip() for cell in found.group(1).split("|")[1:4])
            yield what, published, computed, found.group(2)


ROWS = list(rows())


def as_printed(value, pattern):
    """`value` with as many decimals, and commas where, the page prints `pattern`."""
    decimals = len(pattern.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in pattern else f"{value:.{decimals}f}"


@pytest.mark.parametrize(("what", "published", "computed", "expression"), ROWS, ids=[f"{r[0]}: {r[3]}" for r in ROWS])
def test_the_page_prints_what_the_planner_computes(what, published, computed, expression):
    assert as_printed(eval(expression, globals()), computed) == computed


def test_predicted_steps_are_near_measured_ones():
    steps = [(float(measured), float(computed)) for _, measured, computed, expression in ROWS if "step_" in expression]
    assert len(steps) == 2
    for measured, computed in steps:
        assert 0.85 < computed / measured < 1.1


def test_predicted_peaks_are_within_one_percent_of_measured_ones():
    peaks = [(float(measured), float(computed)) for _, measured, computed, expression in ROWS if "peak_" in expression]
    assert len(peaks) == 2
    for measured, computed in peaks:
        assert computed == pytest.approx(measured, rel=0.01)


def test_the_model_of_the_page_is_the_training_benchmark_s():
    assert lite == model_config("lite")


def test_every_table_row_is_checked():
    text = PAGE.read_text(encoding="utf-8")
    table_rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    headers = [line for line in table_rows if line.rstrip("| ").endswith("expression")]
    assert len(ROWS) == len(table_rows) - len(headers)
    assert len(ROWS) > 60


def test_the_page_lists_the_figures_people_ask_for():
    computed = {row[2] for row in ROWS}
    wanted = "671,026,419,200 36,625,618,432 70,272 110,592 15,552 34,560 93.3 250.5 155.3 516,096 327,680".split()
    assert set(wanted) <= computed


def test_the_peak_used_on_the_page_is_the_device_file_s():
    assert find_device("h800").peak["bf16"] == 989.4e12

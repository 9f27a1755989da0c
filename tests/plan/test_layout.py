"""The layout search, and the answer to a run that does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benthic.config import ModelConfig
from benthic.errors import CapacityError, ConfigError
from benthic.plan.devices import DEVICES
from benthic.plan.layout import fitting, layouts, require_fit, search
from benthic.plan.memory import training_memory
from benthic.plan.training import Training

LITE = ModelConfig.from_pretrained("deepseek-v2-lite")
H200 = DEVICES["h200"]


def test_layouts_use_every_gpu_and_suit_the_model():
    found = list(layouts(LITE, H200, 16))
    assert len(found) == len({layout.model_dump_json() for layout in found})
    for layout in found:
        assert layout.world == 16
        layout.check_model(LITE)


def test_what_is_found_fits_and_is_the_best_of_all_that_do():
    training = Training(4096)
    best = search(LITE, training, H200, sequences=32, gpus=8)
    assert best.memory.total <= H200.memory_bytes
    assert best.memory.total == training_memory(LITE, best.training, best.layout, best.step.stages).total
    every = list(fitting(LITE, training, H200, 32, 8))
    assert best.step.total == min(choice.step.total for choice in every)


def test_objectives_trade_gpus_for_time():
    fewest = search(LITE, Training(4096), H200, 32, objective="fewest_gpus")
    fastest = search(LITE, Training(4096), H200, 32, gpus=8, objective="least_time")
    cheapest = search(LITE, Training(4096), H200, 32, gpus=8, objective="least_cost")
    assert fewest.layout.world == 2
    assert fastest.step.total <= min(fewest.step.total, cheapest.step.total)
    assert cheapest.layout.world * cheapest.step.total <= fastest.layout.world * fastest.step.total
    assert not list(fitting(LITE, Training(4096), H200, 32, 1))


def test_too_few_gpus_are_answered_with_how_many_would_do():
    with pytest.raises(CapacityError) as error:
        search(LITE, Training(4096), H200, 32, gpus=1)
    assert str(error.value) == (
        "no layout of up to 1 NVIDIA H200 SXM 141 GB fits sequences of 4096 positions, 1 at a time, in batches of 32\n"
        "hint: 2 GPUs are the fewest that fit it"
    )


@pytest.mark.parametrize(
    ("objective", "gpus", "part"),
    [
        ("cheapest", None, "objective is 'cheapest'; allowed: fewest_gpus, least_time, least_cost"),
        ("least_time", 0, "gpus is 0; it must be at least 1"),
    ],
)
def test_wrong_questions_are_refused(objective, gpus, part):
    with pytest.raises(ConfigError, match=part):
        search(LITE, Training(4096), H200, 32, gpus, objective)


@pytest.mark.parametrize(
    ("layers", "training", "recomputations", "start"),
    [
        (8, Training(4096, 32), ("none",), "what fits: micro-batches of 22, recomputation 'none'"),
        (10, Training(65536, 1), ("none",), "what fits: micro-batches of 1, sequences of "),
        (27, Training(4096, 4), ("none", "layer"), "what fits: 15 of 27 layers"),
    ],
)
def test_a_run_that_does_not_fit_is_answered_with_the_largest_that_does(layers, training, recomputations, start):
    config = LITE.replace(num_hidden_layers=layers, max_position_embeddings=1 << 20)
    with pytest.raises(CapacityError) as error:
        require_fit(config, training, H200, recomputations=recomputations)
    assert error.value.hint.startswith(start)
    assert "training needs" in error.value.message
    assert error.value.message.endswith("NVIDIA H200 SXM 141 GB has 139 GiB")


@pytest.mark.parametrize(("device", "layers", "unit"), [(DEVICES["cpu"], 1, "MiB"), (H200, 3, "GiB")])
def test_what_is_refused_needs_more_than_there_is_in_the_printed_numbers_too(device, layers, unit):
    config = LITE.replace(num_hidden_layers=layers)
    needed = training_memory(config, Training(64), device=device).total
    small = replace(device, title="it", memory_bytes=int(needed) - 1)
    with pytest.raises(CapacityError) as error:
        require_fit(config, Training(64), small)
    numbers = re.search(rf"needs ([\d,]+) {unit} .* it has ([\d,]+) {unit}$", error.value.message)
    more, less = (int(number.replace(",", "")) for number in numbers.groups())
    assert more == less + 1


def test_the_largest_micro_batch_named_is_the_largest():
    config = LITE.replace(num_hidden_layers=8)
    assert require_fit(config, Training(4096, 22), H200).total < H200.memory_bytes
    with pytest.raises(CapacityError):
        require_fit(config, Training(4096, 23), H200)


def test_a_run_that_fits_is_told_its_memory():
    config = LITE.replace(num_hidden_layers=4)
    assert require_fit(config, Training(4096, 4), H200).total < H200.memory_bytes

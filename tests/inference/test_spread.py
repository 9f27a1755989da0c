"""A model spread over two processes answers as it does in one."""

from __future__ import annotations

import pytest
import torch

from benthic.config.engine import EngineConfig
from benthic.errors import ConfigError, PeerError, RequestError
from benthic.inference.engine import Engine
from benthic.inference.pretrained import save_model
from benthic.inference.spread import SpreadEngine
from benthic.model.sampling import SamplingParams
from tests.inference.test_engine import NARROW, prompts_of
from tests.model.configs import CONFIGS, randomised, tiny
from tests.parallel.processes import on_ranks

CONFIG = tiny(**CONFIGS["v3"] | NARROW, dtype="float32")
PARAMS = SamplingParams(max_tokens=8, temperature=0)
SETTINGS = {"block_size": 4, "num_blocks": 30, "max_step_tokens": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("spread")
    for weights in ("fp32", "fp8"):
        save_model(randomised(CONFIG), path / weights, weights=weights)
    return path


def answers_of_a_rank(folder, settings, spare, loads):
    """Of the first rank three prompts, of the second one and then none; then what is measured and held."""
    prompts = prompts_of(CONFIG, [5, 20, 3, 9])
    with SpreadEngine(folder, "cpu", settings=EngineConfig(**settings), spare=spare, loads=loads) as engine:
        mine = [prompts[:3], prompts[3:]][engine.rank]
        done = [one.token_ids for one in engine.generate(mine, PARAMS)]
        done += [one.token_ids for one in engine.generate(mine[:1] if engine.rank == 0 else [], PARAMS)]
        engine.check()
        places = [engine.model.model.layers[layer].mlp.experts.down_proj.shape[0] for layer in (1, 2)]
        return done, engine.measured_loads(), places


@pytest.mark.parametrize(("weights", "spare", "loads"), [("plain", 0, None), ("float8", 2, {1: [9.0] + [1.0] * 7})])
def test_two_ranks_answer_as_one_process(folder, weights, spare, loads):
    stored = folder / ("fp8" if weights == "float8" else "fp32")
    settings = SETTINGS | {"weights": weights}
    first, second = on_ranks(2, answers_of_a_rank, stored, settings, spare, loads)
    engine = Engine(stored, settings=EngineConfig(**settings))
    expected = [one.token_ids for one in engine.generate(prompts_of(CONFIG, [5, 20, 3, 9]), PARAMS)]
    assert first[0] == [*expected[:3], expected[0]]
    assert second[0] == [expected[3]]
    assert first[1] == second[1]
    assert first[2] == [4 + spare] * 2
    # Each token but an answer's last goes to three experts of each of two layers; the second time 4 of 5 are known.
    computed = sum(length + 7 for length in (5, 20, 3, 9)) + 1 + 7
    assert [sum(counts) for counts in first[1].values()] == [3 * computed] * 2


def failing_rank(folder):
    with SpreadEngine(folder, "cpu", settings=EngineConfig(**SETTINGS)) as engine:
        try:
            engine.generate([[1, 2, 3]] if engine.rank else [[]], PARAMS)
        except (RequestError, PeerError) as error:
            return type(error).__name__, str(error)
    return None


def test_where_one_rank_fails_the_others_do_not_wait(folder):
    first, second = on_ranks(2, failing_rank, folder / "fp32")
    assert first[0] == "RequestError"
    assert second == ("PeerError", "another rank could not go on")


def spread_dense(folder):
    try:
        SpreadEngine(folder, "cpu")
    except ConfigError as error:
        return str(error)
    return None


def test_a_model_without_experts_is_refused(tmp_path):
    save_model(randomised(tiny(dtype="float32")), tmp_path, weights="fp32")
    (found,) = on_ranks(1, spread_dense, tmp_path)
    assert "a model without routed experts has nothing to spread" in found


def test_a_stack_of_some_experts_is_loaded_in_its_order(folder):
    from benthic.checkpoint.reader import load_into

    whole, part = randomised(CONFIG, seed=5), randomised(CONFIG, seed=6)
    experts, held = part.model.layers[1].mlp.experts, (6, 1)
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name).detach()[:2].clone()))
    names = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    load_into(whole, folder / "fp32")
    load_into(part, folder / "fp32", dict.fromkeys(names, held))
    for name in names:
        assert torch.equal(part.get_parameter(name), whole.get_parameter(name)[list(held)])

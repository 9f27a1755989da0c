"""What a captured call reads is what the batch is, and what fills it up belongs to nobody."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._pytree import tree_leaves

from benthic.config.engine import EngineConfig
from benthic.inference import graphs
from benthic.inference.batch import Stretch
from benthic.inference.engine import Engine
from benthic.inference.generate import generate
from benthic.inference.graphs import PATIENCE, Graphs, _Inputs, _rounded, _Size, _size, suits
from benthic.model.sampling import SamplingParams
from benthic.numerics.compare import assert_close
from tests.inference.test_engine import Schedule, run
from tests.model.configs import CONFIGS, randomised, tiny, tokens


def test_sizes_grow_by_an_eighth_at_most_and_never_shrink():
    counts = (1, 2, 7, 16, 17, 33, 100, 256)
    assert [_rounded(count) for count in counts] == [1, 2, 7, 16, 18, 36, 104, 256]
    for count in range(1, 600):
        assert count <= _rounded(count) <= 1.125 * count


def test_drafts_suit_a_graph_and_prompts_do_not():
    assert suits([Stretch([1], 4, [0]), Stretch([1, 2], 4, [1])])
    assert not suits([Stretch([1], 4, [0]), Stretch(range(18), 0, [1])])
    assert not suits([Stretch([1], 4, [0])] * 513)


def test_how_many_drafts_were_right_makes_no_size():
    def size(*lengths):
        return _size([Stretch(range(length), 4, [0]) for length in sorted(lengths)])

    assert size(1, 1, 1) == (3, 3, 32)
    assert {size(1, 2, 2), size(1, 1, 2), size(2, 2, 2)} == {(6, 3, 32)}
    assert size(*[1] * 20, 17) == (40, 22, 32)  # the end of a prompt beside answers: not 357 rows
    assert size(*[2] * 256) == (512, 256, 32)


def test_a_size_that_came_once_is_served_by_a_larger_graph(monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", Replayed)
    served = []

    def call(tokens, known, pages):
        served.append(len(tokens))
        return tokens.clone()

    captured = Graphs(call, [torch.zeros(20, 4, 5)], 4, None)

    def run(count):
        stretches = [Stretch([7 + place], 5, [1, 2]) for place in range(count)]
        assert captured.run(stretches)[:count].tolist() == [7 + place for place in range(count)]
        return served[-1]

    assert run(12) == 12
    assert [run(9) for _ in range(PATIENCE)] == [12] * PATIENCE
    assert run(9) == 9
    assert run(10) == 12
    assert run(4) == 4  # 9 rows cost too much
    assert run(13) == 13


def test_added_rows_are_written_nowhere_and_see_nothing():
    inputs = _Inputs(_Size(4, 3, 8), [torch.zeros(20, 4, 5)], 4, 0, torch.zeros(4, 6))
    blocks = [[9, 3], [7]]
    inputs.fill([Stretch([11], 5, blocks[0]), Stretch([12, 13], 1, blocks[1])], torch.ones(3, 6))
    pages = inputs.pages
    assert inputs.tokens.tolist() == [11, 12, 13, 0]
    assert pages.positions.tolist() == [5, 1, 2, 0]
    assert pages.slots.tolist() == [13, 29, 30, -1]
    assert pages.starts.tolist() == [0, 1, 3, 3]
    assert pages.lengths.tolist() == [6, 3, 0]
    assert pages.tables[:, :2].tolist() == [[9, 3], [7, 0], [0, 0]]
    assert inputs.known.sum(1).tolist() == [6, 6, 6, 0]
    assert pages.bounds[pages.narrower_than(2)] == 4
    # A list that grew, one of another sequence, and one sequence fewer.
    blocks[0].append(5)
    inputs.fill([Stretch([1], 8, blocks[0]), Stretch([2], 4, [4, 6])], None)
    assert pages.tables[:2, :3].tolist() == [[9, 3, 5], [4, 6, 0]]
    inputs.fill([Stretch([2], 5, [1, 2])], None)
    assert pages.tables[0, :2].tolist() == [1, 2]
    assert pages.slots.tolist() == [9, -1, -1, -1]
    assert pages.starts.tolist() == [0, 1, 1, 1]


class Replayed:
    """Stands in for a captured graph where there is no GPU: a replay computes from the same tensors again, and leaves
    its results where the last one's were."""

    def __init__(self, call, inputs, memory):
        self.inputs, self.graph = inputs, self
        self._call = lambda: call(inputs.tokens, inputs.known, inputs.pages)
        self.result = self._call()

    def replay(self):
        for target, found in zip(tree_leaves(self.result), tree_leaves(self._call()), strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(found)


@pytest.mark.usefixtures("_as_a_user")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=Schedule)
def test_steps_that_begin_before_the_last_ones_tokens_are_read_change_no_answer(schedule):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_Captured", Replayed)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        run(schedule, lambda engine: setattr(engine.runner, "_graphs", engine.runner._capturable()))


@pytest.mark.usefixtures("_as_a_user")
def test_decoding_runs_one_step_ahead_and_what_needs_more_does_not(make_engine, monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = randomised(tiny(**CONFIGS["v3"]))
    greedy = SamplingParams(max_tokens=20, temperature=0)
    for params, runs_ahead in (
        (greedy, True),
        (greedy.replace(temperature=0.7, top_p=0.9, seed=3), True),
        (greedy.replace(logprobs=2), False),
        (greedy.replace(frequency_penalty=0.5), False),
    ):
        engine = make_engine(model, block_size=4, num_blocks=40)
        engine.runner._graphs = engine.runner._capturable()
        (first,) = engine.add_request([1, 2, 3], params)
        (second,) = engine.add_request([4, 5], params.replace(max_tokens=7))
        found, ahead = {first: [], second: []}, 0
        while engine.has_work:
            for event in engine.step():
                found[event.request_id] += event.token_ids
            ahead += engine._flight is not None
            engine.check()
        assert (ahead > 15) == runs_ahead == (ahead > 0)
        plain = make_engine(model, num_blocks=40)
        expected = plain.generate([[1, 2, 3], [4, 5]], [params, params.replace(max_tokens=7)])
        assert list(found.values()) == [one.token_ids for one in expected]


@pytest.mark.usefixtures("_as_a_user")
def test_an_answer_that_ends_while_its_next_step_is_under_way_ends_there(make_engine, monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    config = tiny(**CONFIGS["v3"])
    model, params = randomised(config), SamplingParams(max_tokens=20, temperature=0)
    ids = list(generate(model, [1, 2, 3], params))
    engine = make_engine(model, block_size=4, num_blocks=40)
    engine.runner._graphs = engine.runner._capturable()
    stopping = params.replace(stop_token_ids=(ids[6],))
    ended, whole = engine.generate([[1, 2, 3], [1, 2, 3]], [stopping, params])
    assert (ended.token_ids, ended.finish_reason) == (ids[: ids.index(ids[6])], "stop")
    assert whole.token_ids == ids
    (request_id,) = engine.add_request([1, 2, 3], params)
    for _ in range(3):
        engine.step()
    assert engine.cancel(request_id).token_ids == ids[:3]
    engine.check()
    assert not engine.has_work
    assert engine.generate([[1, 2, 3]], params)[0].token_ids == ids


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["v3 of two predictions", "multi-query with predictions"])
def test_rounded_up_calls_change_no_answer(name, speculative, make_engine, monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    config = tiny(**CONFIGS[name])
    model = randomised(config)
    engine = make_engine(model, speculative, block_size=4, num_blocks=60, max_step_tokens=30, draft_tokens=3)
    engine.runner._graphs = engine.runner._capturable()
    prompts = [tokens(config, 1, length, length)[0].tolist() for length in (1, 2, 30, 7, 40, 5, 9, 3, 4, 8, 6, 10)]
    prompts += [[1, 2]] * 8
    wishes = [SamplingParams(max_tokens=8 + place % 5, temperature=place % 2, seed=1) for place in range(len(prompts))]
    done = engine.generate(prompts, wishes)
    for one, prompt, params in zip(done, prompts, wishes, strict=True):
        assert one.token_ids == list(generate(model, prompt, params))
        ids = torch.tensor([prompt + one.token_ids])
        with torch.no_grad():
            logprobs = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert_close(torch.tensor(one.logprobs), logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0], "model_fp32")
    assert len(engine.runner._graphs[0]._captured) > 3
    assert all(sizes._captured for sizes in engine.runner._graphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("name", ["v3", "multi-query with predictions"])
def test_graphs_give_what_launches_give_and_what_the_whole_sequence_gives(name, speculative):
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
    wide |= {"qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 48}
    changes = CONFIGS[name] | {
        key: value for key, value in wide.items() if key in CONFIGS[name] or key == "hidden_size"
    }
    config = tiny(**changes, max_position_embeddings=256)
    model = randomised(config).to("cuda", torch.bfloat16)
    prompts = [tokens(config, 1, length, length)[0].tolist() for length in (1, 3, 30, 7, 100)]
    params = SamplingParams(max_tokens=20, temperature=0)
    found = []
    for captured in (True, False):
        engine = Engine(model, speculative=speculative, settings=EngineConfig(num_blocks=100, cuda_graphs=captured))
        found.append(engine.generate(prompts, params))
        engine.check()
    for with_graphs, without, prompt in zip(*found, prompts, strict=True):
        same = sum(a == b for a, b in zip(with_graphs.token_ids, without.token_ids, strict=True))
        assert same >= 1
        with torch.inference_mode():
            ids = torch.tensor([prompt + with_graphs.token_ids], device="cuda")
            expected = model(ids)[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = expected.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        assert_close(torch.tensor(with_graphs.logprobs), chosen.cpu(), "model_bf16")

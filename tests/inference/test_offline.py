"""Files of prompts become files of answers, also when the first attempt is cut off."""

from __future__ import annotations

import json

import pytest

from benthic.errors import DataError, RunError
from benthic.inference.offline import answer_file
from benthic.model.sampling import SamplingParams
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny

PARAMS = SamplingParams(max_tokens=6, temperature=0)
LINES = [
    {"prompt": "def add"},
    {"token_ids": [5, 6, 7]},
    {"prompt": "return", "params": {"max_tokens": 3, "n": 2, "temperature": 1.0, "seed": 1}},
    {"token_ids": []},
    {"prompt": "first", "params": {"temprature": 1}},
    {"messages": [{"role": "user", "content": "add"}]},
    {"prompt": "second", "id": "kept by the caller"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)


@pytest.fixture
def engine(tokenizer, make_engine):
    model = randomised(tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    return make_engine(model, True, tokenizer, max_sequences=2, num_blocks=100)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(row):
    return row["index"], row.get("error"), [one["text"] for one in row.get("completions", [])]


def test_every_line_is_answered_in_its_place(engine, source, tmp_path):
    summary = answer_file(engine, source, tmp_path / "out.jsonl", PARAMS)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["index"] for row in rows] == list(range(len(LINES)))
    (alone,) = engine.generate(["def add"], PARAMS)
    assert rows[0]["completions"][0]["text"] == alone.text
    assert rows[0]["completions"][0]["token_ids"] == alone.token_ids
    assert rows[1]["prompt_tokens"] == 3
    assert [len(one["token_ids"]) for one in rows[2]["completions"]] == [3, 3]
    assert "the prompt has no tokens" in rows[3]["error"]
    assert "did you mean 'temperature'?" in rows[4]["error"]
    assert summary["failed"] == sum("error" in row for row in rows)
    assert summary["answered"] + summary["failed"] == len(LINES)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupted_run_goes_on_where_it_was(engine, source, tmp_path, monkeypatch):
    answer_file(engine, source, tmp_path / "whole.jsonl", PARAMS)
    steps, output = [], tmp_path / "out.jsonl"
    step = engine.step

    def stop_after_some():
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        answer_file(engine, source, output, PARAMS)
    monkeypatch.undo()
    for request_id in range(100):
        engine.cancel(request_id)
    assert not output.exists()
    partial = tmp_path / ".out.jsonl.partial"
    done = rows_of(partial)[1:]
    assert 0 < len(done) < len(LINES)
    with partial.open("ab") as file:
        file.write(b'{"index": 6, "prom')
    answer_file(engine, source, output, PARAMS)
    assert [texts_of(row) for row in rows_of(output)] == [texts_of(row) for row in rows_of(tmp_path / "whole.jsonl")]
    assert not partial.exists()


def test_answers_to_another_input_are_not_mixed_in(engine, source, tmp_path):
    output = tmp_path / "out.jsonl"
    (tmp_path / ".out.jsonl.partial").write_text('{"input": "another", "params": {}}\n')
    with pytest.raises(RunError, match="holds answers to another input, or with other settings"):
        answer_file(engine, source, output, PARAMS)
    (tmp_path / ".out.jsonl.partial").write_text("no JSON\n")
    with pytest.raises(RunError, match="holds answers to another input, or with other settings"):
        answer_file(engine, source, output, PARAMS)
    output.write_text("")
    with pytest.raises(RunError, match="exists already"):
        answer_file(engine, source, output, PARAMS)


def test_odd_characters_and_odd_params_cost_no_other_line(engine, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a\u2028\x85b"}\n{"prompt": "\\ud800"}\n{"prompt": "a", "params": 5}\n', "utf-8")
    summary = answer_file(engine, source, output, PARAMS)
    assert (summary["answered"], summary["failed"]) == (1, 2)
    assert "params must be an object, not 5" in rows_of(output)[2]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1 of .* must be an object with one of prompt, token_ids, messages"),
        ('{"prompt": "a"}\n{"prompt": "a", "token_ids": [1]}\n', "line 2 of .* must be an object with one of"),
        ('{"prompt": "a"\n', "line 1 of .* is not JSON"),
        ("[]\n", "line 1 of .* must be an object"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(engine, tmp_path, text, message):
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(DataError, match=message):
        answer_file(engine, source, tmp_path / "out.jsonl", PARAMS)
    with pytest.raises(DataError, match="cannot read"):
        answer_file(engine, tmp_path / "absent", tmp_path / "out.jsonl", PARAMS)

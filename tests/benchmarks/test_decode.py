"""The engine's benchmark: its figures, and luck that is the same in every run."""

from __future__ import annotations

import pytest

from benchmarks import decode, readme_table


@pytest.fixture(scope="module")
def result():
    return decode.measure(
        decode.Workload(
            batches=(1, 3),
            prompt_tokens=5,
            new_tokens=9,
            repetitions=2,
            dtype="float32",
            draft_tokens=1,
            acceptance=0.7,
        )
    )


def test_every_size_has_its_figures(result):
    assert [row["batch"] for row in result["results"]] == [1, 3]
    for row in result["results"]:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
        assert 1 + 8 / 2 <= row["steps"] < 9, "some drafts were right, and none was worth more than one token"
    assert decode.table(result).startswith("start-up ")


def test_drafts_have_the_same_luck_in_every_run():
    workload = decode.Workload(prompt_tokens=5, dtype="float32", draft_tokens=1, acceptance=0.5)
    engine, dice = decode._engine(workload), decode.random.Random(0)
    steps = {decode._seconds(engine, 2, 20, workload, dice)[1] for _ in range(3)}
    assert len(steps) == 1


def test_rows_of_the_table_stand_beside_the_peers(result):
    peer = {"name": "vLLM", "version": "0.26.0", "startup_seconds": 100.0, "results": [
        {"batch": 3, "tokens_per_second": result["results"][1]["tokens_per_second"] / 2,
         "prompt_tokens_per_second": result["results"][1]["prompt_tokens_per_second"] * 2},
    ]}  # fmt: skip
    rows = list(readme_table.ROWS[result["name"]](result | {"peer": peer}))
    assert len(rows) == 5
    assert rows[0].startswith("| decoding, batch 1, 0.0 B, float32, 1 draft, 70% of them right | ")
    assert "vLLM 0.26.0: " not in rows[0]
    assert "vLLM 0.26.0: " in rows[1]
    assert "| 2.00 |" in rows[1]
    assert "| 0.50 |" in rows[3]
    assert "vLLM 0.26.0: 100 s" in rows[4]
    assert len(list(readme_table.ROWS["decode"](result))) == 5

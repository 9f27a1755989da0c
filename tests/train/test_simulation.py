"""Layouts of many ranks tried in one process: what is found, and that faults are."""

import pytest

from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError, NumericsError
from benthic.parallel.placement import Part
from benthic.train import simulation
from benthic.train.simulation import exchange, simulate
from tests.train.small import small_model, small_run


def a_run(layout: str):
    # Widths that come out even: on blocks of a few numbers, one number more is more than the planner's five percent.
    return small_run(batch={"sequences": 32, "micro_sequences": 1}, parallel=ParallelConfig.parse(layout))


@pytest.mark.parametrize("layout", ["fsdp=4", "fsdp=16,ep=4", "dp=2,fsdp=8,ep=8", "fsdp=2,zero=1,ep=2"])
def test_a_layout_that_holds_is_described_in_numbers(layout):
    config = a_run(layout)
    told = list(simulate(config))
    assert told[0].startswith(f"layout {config.parallel}: {config.parallel.world} ranks; ")
    assert "are made up by their blocks exactly" in told[1]
    assert "built by FSDP hold the blocks they should" in told[2]
    assert ("every send has its receive" in told[-1]) == ("ep=" in layout)


@pytest.mark.parametrize("layout", ["pp=2", "fsdp=4,zero=1,ep=4,pp=2,schedule=interleaved,vp=2", "pp=2,schedule=zbv"])
def test_a_pipeline_s_layout_that_holds_is_described_in_numbers(layout):
    config = a_run(layout).replace(model=small_model(num_hidden_layers=5))
    told = list(simulate(config))
    assert told[1].startswith("stages: layers 0-")
    assert told[1].endswith("-5")
    assert "are made up by their blocks exactly" in told[2]
    assert "built by FSDP hold the blocks they should" in told[3]
    assert told[4].startswith("memory: what updates need")


def test_blocks_that_leave_a_gap_are_found(monkeypatch):
    def first_row_missing(row, seat):
        return Part(row.shape, (1, *(0 for _ in row.shape[1:])), (row.shape[0] - 1, *row.shape[1:]))

    monkeypatch.setattr(simulation, "part", first_row_missing)
    with pytest.raises(NumericsError, match=r"the blocks of \S+ cover 10,208 of 10,240 elements, or some twice"):
        list(simulate(a_run("fsdp=4")))


def test_a_rank_that_holds_another_block_is_found(monkeypatch):
    monkeypatch.setattr(simulation, "parts", lambda model, seat: {name: Part((), (), (0,)) for name in names(model)})
    with pytest.raises(
        NumericsError, match=r"rank 0 holds \[80, 32\] of model\.embed_tokens\.weight; its block is \[0\]"
    ):
        list(simulate(a_run("fsdp=4")))


def names(model):
    return [row.name for row in simulation.parameters(model)]


def test_an_exchange_moves_a_token_once_to_each_of_its_ranks():
    found = exchange(a_run("fsdp=4,ep=4"))
    tokens = 16  # positions of a micro-batch; two experts each, of two of four ranks or of one
    assert tokens / 2 < found.sent < 2 * tokens
    assert tokens < found.most_received <= 4 * tokens
    assert found.row_bytes == 2 * 32


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="a batch of 32 sequences does not divide"):
        list(simulate(a_run("fsdp=5")))

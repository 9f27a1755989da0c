"""Layouts of many ranks tried in one process: what is found, and that faults are."""

import pytest

from benthic.cli.main import main
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError, NumericsError
from benthic.parallel.placement import Part
from benthic.plan import memory
from benthic.recipes import find_recipe
from benthic.train import pipeline, simulated_messages, simulation
from benthic.train.simulated_messages import exchange
from benthic.train.simulation import counts, simulate
from tests.train.small import small_model, small_run


def a_run(layout: str, **changes):
    # Widths that come out even: on blocks of a few numbers, one number more is more than the planner's five percent.
    batch = {"sequences": 32, "micro_sequences": 1}
    return small_run(**({"batch": batch, "parallel": ParallelConfig.parse(layout)} | changes))


def line(told, beginning: str) -> str:
    (found,) = (one for one in told if one.startswith(beginning))
    return found


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "layout",
    [
        "fsdp=4",
        "dp=4",
        "fsdp=16,ep=4",
        "dp=2,fsdp=8,ep=8",
        "fsdp=2,zero=1,ep=2",
        "cp=2,tp=2",
        "dp=2,cp=2,tp=2,ep=4",
    ],
)
def test_a_layout_that_holds_is_described_in_numbers(layout, compute):
    config = a_run(layout, precision={"compute": compute})
    told = list(simulate(config))
    assert told[0].startswith(f"layout {config.parallel}: {config.parallel.world} ranks; ")
    assert "are made up by their blocks exactly" in told[1]
    assert "built by FSDP hold the blocks they should" in told[2]
    assert told[4].startswith(f"  rank 0, {config.parallel.world} alike ")
    assert any("every send has its receive" in one for one in told) == ("ep=" in layout)
    assert told[-1].startswith("simulated in ")


@pytest.mark.parametrize(
    "layout",
    ["pp=2", "fsdp=4,zero=1,ep=4,pp=2,schedule=interleaved,vp=2", "pp=2,schedule=zbv", "pp=2,schedule=dualpipev"],
)
def test_a_pipeline_s_layout_that_holds_is_described_in_numbers(layout):
    config = a_run(layout, model=small_model(num_hidden_layers=5))
    told = list(simulate(config))
    assert told[1].startswith("stages: layers 0-")
    assert told[1].endswith("-5")
    assert "are made up by their blocks exactly" in told[2]
    assert "built by FSDP hold the blocks they should" in told[3]
    borders = 3 if "interleaved" in layout else 2 if "v" in layout else 1
    count = counts(config)[-1]
    # States and the embedding beside them, bfloat16.
    expected = f"are {2 * borders * count:,} messages of {16 * 2 * 32 * 2:,} bytes between its ranks; each is received"
    assert expected in line(told, "pipeline: ")


def test_deepseek_v3_over_2048_ranks_holds():
    """The whole model under its report's layout: 671B parameters, 16 stages' ranks, experts over 64, ZeRO-1."""
    config = find_recipe("deepseek-v3")()
    told = list(simulate(config))
    assert told[0].startswith(
        "layout fsdp=128,zero=1,ep=64,pp=16,schedule=dualpipev: 2048 ranks; 32 stages over 16 ranks"
    )
    assert line(told, "blocks: ") == "blocks: 987 tensors are made up by their blocks exactly, over 2,048 ranks"
    alike = [one for one in told if one.startswith("  rank ")]
    assert sum(int(one.split(",", 1)[1].split(" alike")[0].replace(",", "")) for one in alike) == 2 * 2048
    small, large = (one for one in told if one.startswith("pipeline: "))
    assert small.startswith("pipeline: 24 micro-batches a rank under zbv are 1,440 messages of 117,440,512 bytes")
    assert large.startswith(
        "pipeline: 120 micro-batches a rank under dualpipev are 7,200 messages of 117,440,512 bytes"
    )


def test_blocks_that_leave_a_gap_are_found(monkeypatch):
    def first_row_missing(row, seat):
        return Part(row.shape, (1, *(0 for _ in row.shape[1:])), (row.shape[0] - 1, *row.shape[1:]))

    monkeypatch.setattr(simulation, "part", first_row_missing)
    with pytest.raises(NumericsError, match=r"the blocks of \S+ cover 10,208 of 10,240 elements, or some twice"):
        list(simulate(a_run("fsdp=4")))


def test_a_block_with_a_copy_too_few_is_found(monkeypatch):
    monkeypatch.setattr(simulation, "copies", lambda row, seat: 3)
    with pytest.raises(NumericsError) as error:
        list(simulate(a_run("dp=2,fsdp=2")))
    assert error.value.message == (
        "the block of lm_head.weight that starts at [0, 0] is on 2 ranks, first 0; it should be on 3"
    )


def test_a_check_that_fails_is_an_exit_code_and_a_name(monkeypatch, capsys):
    monkeypatch.setattr(simulation, "copies", lambda row, seat: 3)
    assert main(["train", "tiny", "--simulate-world", "4", "--batch.sequences", "32"]) == NumericsError.exit_code
    assert "error: the block of lm_head.weight that starts at [0, 0] is on 1 ranks" in capsys.readouterr().err


def test_a_rank_that_holds_another_block_is_found(monkeypatch):
    monkeypatch.setattr(simulation, "parts", lambda model, seat: {name: Part((), (), (0,)) for name in names(model)})
    with pytest.raises(
        NumericsError, match=r"rank 0 holds \[80, 32\] of model\.embed_tokens\.weight; its block is \[0\]"
    ):
        list(simulate(a_run("fsdp=4")))


def names(model):
    return [row.name for row in simulation.parameters(model)]


def test_a_planner_that_counts_other_bytes_is_found(monkeypatch):
    monkeypatch.setattr(memory, "FP8_COPIES", 16.0)
    layout = "fsdp=2,zero=1,ep=2,pp=2,schedule=dualpipev"
    config = a_run(layout, model=small_model(num_hidden_layers=5), precision={"compute": "float8"})
    with pytest.raises(NumericsError) as error:
        list(simulate(config))
    assert error.value.message.startswith("rank 0 keeps ")
    assert "more than 5% apart, most of it in weights in FP8, both ways round, " in error.value.message


def test_a_schedule_that_loses_a_receive_is_found(monkeypatch):
    whole = pipeline.Pipeline.schedule

    def without_a_receive(self, micro_batches):
        schedule = whole(self, micro_batches)
        actions = schedule.pipeline_order_with_comms[1]
        actions.pop(next(i for i, one in enumerate(actions) if one.computation_type.name == "RECV_F"))
        return schedule

    monkeypatch.setattr(pipeline.Pipeline, "schedule", without_a_receive)
    with pytest.raises(
        NumericsError, match="pipeline rank 1 receives the states of micro-batch 0 from stage 0 to 1 0 "
    ):
        list(simulate(a_run("pp=2,schedule=zbv", model=small_model(num_hidden_layers=5))))


def test_an_exchange_moves_a_token_once_to_each_of_its_ranks():
    found = exchange(a_run("fsdp=4,ep=4"))
    tokens = 16  # positions of a micro-batch; two experts each, of two of four ranks or of one
    assert tokens / 2 < found.sent < 2 * tokens
    assert tokens < found.most_received <= 4 * tokens
    assert found.row_bytes == {
        "tokens": 2 * 32 + 8 * 2,
        "results": 2 * 32,
        "gradients of results": 2 * 32,
        "gradients of tokens": 2 * 32 + 8 * 2,
    }


def test_rows_that_are_sent_twice_are_found(monkeypatch):
    monkeypatch.setattr(simulated_messages, "without_repeats", lambda ranks: ranks)
    with pytest.raises(
        NumericsError, match=r"in an exchange of tokens rank \d sends rank \d \d+ rows, of \d+ tokens that"
    ):
        exchange(a_run("fsdp=2,ep=2"))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="a batch of 32 sequences does not divide"):
        list(simulate(a_run("fsdp=5")))

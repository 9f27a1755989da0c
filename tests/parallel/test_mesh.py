"""Rank arithmetic, without a process: every rank has one place, experts lie close together, what does not divide is
refused in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.parallel.mesh import Seat, description, grid, require_supported
from tests.train.small import small_model

FOUR = dict(num_attention_heads=4, num_key_value_heads=4)
V3 = ModelConfig.from_pretrained("deepseek-v3")
axis = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> ParallelConfig:
    fields = {name: draw(axis) for name in ("replicate", "shard", "pipeline", "tensor", "context")}
    ranks = fields["replicate"] * fields["shard"] * fields["tensor"] * fields["context"]
    expert = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    return ParallelConfig(**fields, expert=expert, zero=draw(st.integers(0, 3)))


@given(layouts())
def test_every_rank_has_a_place_of_its_own_in_both_meshes(layout):
    found = grid(layout)
    ranks = range(layout.world)
    assert len({found.dense_place(rank) for rank in ranks}) == layout.world
    assert len({found.expert_place(rank) for rank in ranks}) == layout.world


@given(layouts())
def test_ranks_that_share_a_replicas_shards_of_experts_belong_to_one_replica(layout):
    found = grid(layout)
    if found.experts[2] == 1:
        return
    replicas: dict[tuple[int, ...], set[int]] = {}
    for rank in range(layout.world):
        pipeline, expert_replica, _, expert = found.expert_place(rank)
        replicas.setdefault((pipeline, expert_replica, expert), set()).add(found.dense_place(rank)[1])
    assert all(len(seen) == 1 for seen in replicas.values())


def test_experts_lie_over_neighbouring_ranks():
    found = grid(ParallelConfig(shard=4, expert=2))
    assert [found.expert_place(rank)[-1] for rank in range(4)] == [0, 1, 0, 1]
    assert [found.expert_place(rank)[2] for rank in range(4)] == [0, 0, 1, 1]


def test_without_zero_shard_ranks_are_replicas():
    found = grid(ParallelConfig(replicate=2, shard=4, zero=0, expert=2))
    assert (found.dense, found.experts) == ((1, 8, 1, 1), (1, 4, 1, 2))


def test_a_layout_for_another_number_of_processes_is_refused():
    with pytest.raises(ConfigError) as error:
        require_supported(ParallelConfig(shard=4), small_model(), 2)
    assert str(error.value) == (
        "the layout (fsdp=4,zero=3) is for 4 processes, but 2 were started\n"
        "hint: torchrun --nproc-per-node 4, or choose axes that multiply to 2"
    )


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_a_pipeline_of_split_layers_or_sequences_is_refused(axis):
    with pytest.raises(ConfigError, match=rf"parallel\.{axis} is 2 and parallel\.pipeline 2; a stage's ranks "):
        require_supported(ParallelConfig(pipeline=2, **{axis: 2}), small_model(), 4)


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_a_model_without_latents_is_split_over_no_tensor_or_context_ranks(axis):
    plain = small_model(
        kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=None, v_head_dim=None
    )
    with pytest.raises(ConfigError, match=rf"parallel\.{axis} is 2; it needs a model with latent attention .* is mha"):
        require_supported(ParallelConfig(**{axis: 2}), plain, 2)


def test_a_bias_that_every_tensor_rank_would_add_is_refused():
    with pytest.raises(ConfigError, match="each of its ranks would add attention's output bias"):
        require_supported(ParallelConfig(tensor=2), small_model(output_bias=True), 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(), r"tensor is 4; it must divide num_attention_heads \(2\)"),
        (FOUR | dict(vocab_size=322), r"tensor is 4; it must divide vocab_size \(322\)"),
        (FOUR | dict(intermediate_size=66), r"tensor is 4; it must divide intermediate_size \(66\)"),
        (
            FOUR | dict(moe_intermediate_size=18),
            r"tensor is 4; it must divide n_shared_experts x moe_intermediate_size \(18\)",
        ),
    ],
)
def test_what_tensor_ranks_do_not_divide_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        require_supported(ParallelConfig(tensor=4), small_model(**changes), 4)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"expert is 3; it must divide n_routed_experts \(8\)"):
        require_supported(ParallelConfig(shard=3, expert=3), small_model(), 3)


def test_experts_whose_copies_split_neither_them_nor_their_rows_are_refused():
    with pytest.raises(ConfigError, match="4 experts a rank cannot be split over the 3 ranks that hold them"):
        require_supported(ParallelConfig(shard=6, expert=2), small_model(), 6)


def test_the_description_says_what_each_axis_is_for():
    layout = ParallelConfig(replicate=2, shard=128, zero=1, expert=64)
    assert description(layout, V3) == (
        "256 ranks; optimiser states split over 128 (zero 1); 2 replicas, gradients summed over them; "
        "256 experts over 64, 4 each, in 4 copies"
    )


def test_the_description_says_how_sequences_and_heads_are_split():
    told = description(ParallelConfig(context=4, tensor=2), V3)
    assert told == (
        "8 ranks; weights, gradients and optimiser states split over 4 (zero 3); heads, dense and shared widths and "
        "words split over 2, positions too between sublayers; every sequence over 4, an early and a late stretch "
        "each, latents gathered"
    )


@pytest.mark.parametrize(
    ("expert", "groups", "kept", "reached"),
    [(8, 8, 4, 4), (4, 8, 3, 3), (2, 8, 4, None), (16, 8, 4, None), (16, 8, 2, 4), (8, 1, 1, None), (32, 4, 1, None)],
)
def test_the_description_says_how_few_ranks_a_token_goes_to(expert, groups, kept, reached):
    model = small_model(n_routed_experts=64, num_experts_per_tok=8, n_group=groups, topk_group=kept)
    told = description(ParallelConfig(shard=expert, expert=expert), model)
    assert told.partition("; a token goes to at most ")[2] == ("" if reached is None else f"{reached} of them")


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev"])
def test_each_tensor_is_held_by_one_place_of_a_pipeline(schedule):
    layout = ParallelConfig(pipeline=2, shard=2, schedule=schedule, chunks=2 if schedule == "interleaved" else 1)
    stages = [range(0, 2), range(2, 3)] if schedule == "1f1b" else [range(layer, layer + 1) for layer in range(4)]
    model = small_model(num_hidden_layers=len(stages) - 1 if len(stages) == 4 else 2)
    seats = [Seat(layout, rank, stages) for rank in range(4)]
    for row in parameters(model):
        places = {seat.pipeline_rank for seat in seats if seat.holds(row)}
        assert len(places) == 1, row.name
        assert sum(seat.holds(row) for seat in seats) == 2
    ends = {row.name: row for row in parameters(model) if row.layer is None}
    assert seats[0].holds(ends["model.embed_tokens.weight"])
    # A schedule that runs through the ranks and back ends where it began.
    assert seats[0].holds(ends["lm_head.weight"]) == (schedule == "dualpipev")


def test_stages_that_are_not_those_of_the_layout_are_refused():
    with pytest.raises(ConfigError, match=r"the layout \(pp=2\) has 2 stages, but 3 were given"):
        Seat(ParallelConfig(pipeline=2), 0, [range(1), range(1, 2), range(2, 3)])


@pytest.mark.parametrize(
    ("layout", "changes", "told"),
    [
        (
            "pp=2,schedule=dualpipe",
            {},
            "parallel.schedule is 'dualpipe', which holds the model twice; the trainer runs 'dualpipev', its form with "
            "one copy and the same bubble\nhint: --parallel.schedule dualpipev, on 1 or 2 pipeline ranks",
        ),
        (
            "pp=2",
            {"tie_word_embeddings": True},
            "parallel.pipeline is 2, but the model's head is its embedding: one matrix cannot be on the first stage "
            "and on the last\nhint: set model.tie_word_embeddings to false, or leave parallel.pipeline at 1",
        ),
        (
            "fsdp=2,pp=2",
            {},
            "parallel.zero is 3; in a pipeline gradients of all micro-batches add up whole before they are summed over "
            "ranks, so optimiser states alone can be split\nhint: --parallel.zero 1",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(layout, changes, told):
    layout = ParallelConfig.parse(layout)
    with pytest.raises(ConfigError) as error:
        require_supported(layout, small_model(**changes), layout.world)
    assert str(error.value) == told


def test_the_description_of_a_pipeline_names_its_stages_and_schedule():
    layout = ParallelConfig(pipeline=16, schedule="dualpipev", shard=128, zero=1, expert=64)
    assert description(layout, V3).startswith(
        "2048 ranks; 32 stages over 16 ranks, schedule dualpipev; optimiser states split over 128 (zero 1); 256 experts"
    )

"""Layouts: what is refused, in which words, and what follows from the axes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError

V3 = ModelConfig.from_pretrained("deepseek-v3")
V3_LAYOUT = ParallelConfig.parse("pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64")


def message(error: pytest.ExceptionInfo) -> str:
    return str(error.value)


def test_the_layout_of_v3_uses_2048_gpus_and_holds_each_expert_twice():
    assert (V3_LAYOUT.world, V3_LAYOUT.data, V3_LAYOUT.expert_copies, V3_LAYOUT.expert_shards) == (2048, 128, 2, 2)
    assert (V3_LAYOUT.stages, V3_LAYOUT.stages_per_rank) == (16, 2)
    V3_LAYOUT.check_model(V3)
    assert V3_LAYOUT.check_batch(15360, 1, 4096) == 120


axis = st.sampled_from([1, 2, 4, 8])


@given(replicate=axis, shard=axis, context=axis, tensor=axis, pipeline=axis, expert=axis)
def test_axes_multiply_to_the_world_and_experts_fill_a_stage(replicate, shard, context, tensor, pipeline, expert):
    ranks = replicate * shard * context * tensor
    fields = dict(replicate=replicate, shard=shard, context=context, tensor=tensor, pipeline=pipeline, expert=expert)
    if ranks % expert:
        with pytest.raises(ConfigError, match="must divide the ranks of one pipeline stage"):
            ParallelConfig(**fields)
        return
    layout = ParallelConfig(**fields)
    assert layout.world == ranks * pipeline
    assert layout.expert * layout.expert_copies == layout.ranks_in_stage
    assert ParallelConfig(**layout.model_dump()) == layout


@given(shard=axis, pipeline=axis, tensor=axis, zero=st.integers(0, 3))
def test_a_layout_written_as_text_reads_back(shard, pipeline, tensor, zero):
    layout = ParallelConfig(shard=shard, pipeline=pipeline, tensor=tensor, zero=zero if shard > 1 else 3)
    text = str(layout)
    assert (ParallelConfig() if text == "one GPU" else ParallelConfig.parse(text)) == layout


@pytest.mark.parametrize(
    ("text", "part", "hint"),
    [
        ("pp", "layout item 'pp' is not NAME=VALUE", "for example: pp=16,fsdp=128,ep=64"),
        ("pipelin=2", "unknown layout axis 'pipelin' in 'pipelin=2'", "did you mean 'pipeline'?"),
        ("pp=2,pipeline=4", "layout axis 'pipeline' is given twice", "state each axis once"),
        ("pp=0", "pipeline: Input should be greater than 0 (given '0')", ""),
        ("pp=-3", "pipeline: Input should be greater than 0", ""),
        ("ep=3,fsdp=4", "expert is 3; it must divide the ranks of one pipeline stage", ""),
        ("pp=4,schedule=interleaved", "chunks is 1; the interleaved schedule needs at least 2 stages", ""),
        ("pp=4,vp=2", "chunks is 2, which belongs to schedules 'interleaved' and 'zb1p', not '1f1b'", ""),
        ("pp=3,schedule=dualpipe", "pipeline is 3; dualpipe feeds both ends, so it must be even", ""),
        ("schedule=zigzag", "'1f1b', 'gpipe', 'interleaved', 'zb1p', 'zbv', 'dualpipe' or 'dualpipev'", ""),
        ("zero=4", "zero: Input should be less than or equal to 3", ""),
    ],
)
def test_a_wrong_layout_is_refused_in_words(text, part, hint):
    with pytest.raises(ConfigError) as error:
        ParallelConfig.parse(text)
    assert part in message(error)
    assert hint in message(error)


@pytest.mark.parametrize(
    ("text", "part", "hint"),
    [
        ("tp=3", "tensor is 3; it must divide num_attention_heads (128)", "tensor may be 1, 2, 4, 8"),
        ("ep=96,fsdp=96", "expert is 96; it must divide n_routed_experts (256)", "1, 2, 4, 8, 16"),
        ("pp=63", "cuts the model into 63 stages, but it has only 62 layers", "at most 62"),
        ("pp=32,schedule=dualpipev", "cuts the model into 64 stages, but it has only 62 layers", "at most 62"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_names_what_would(text, part, hint):
    with pytest.raises(ConfigError) as error:
        ParallelConfig.parse(text).check_model(V3)
    assert part in message(error)
    assert hint in message(error)


def test_prediction_layers_share_a_stage():
    two = V3.replace(num_nextn_predict_layers=2)
    ParallelConfig(pipeline=62).check_model(two)
    with pytest.raises(ConfigError, match="cuts the model into 63 stages, but it has only 62 layers"):
        ParallelConfig(pipeline=63).check_model(two)


def test_expert_parallelism_of_a_dense_model_is_refused():
    dense = ModelConfig.from_pretrained("olmo2-7b")
    with pytest.raises(ConfigError, match="expert is 2, but the model has no routed experts; it must be 1"):
        ParallelConfig(shard=2, expert=2).check_model(dense)


@pytest.mark.parametrize(
    ("layout", "batch", "part", "hint"),
    [
        ("fsdp=8", (12, 1, 4096), "does not divide into micro-batches of 1 over 8", "multiple of 8, for example 16"),
        ("cp=4", (1, 1, 4098), "sequence_length is 4098; context parallelism over 4 ranks", ""),
        ("pp=4,schedule=interleaved,vp=2", (6, 1, 64), "6 micro-batches a rank do not suit schedule", "multiple of 4"),
        ("pp=4,schedule=dualpipe", (7, 1, 64), "takes them 2 at a time", "multiple of 2"),
        ("pp=4", (3, 1, 64), "3 micro-batches a rank do not fill schedule '1f1b', which needs 4", "at least 4"),
    ],
)
def test_a_batch_that_does_not_divide_names_one_that_does(layout, batch, part, hint):
    with pytest.raises(ConfigError) as error:
        ParallelConfig.parse(layout).check_batch(*batch)
    assert part in message(error)
    assert hint in message(error)


def test_few_micro_batches_go_through_dualpipev_s_stages_as_zero_bubble_v():
    layout = ParallelConfig.parse("fsdp=2,pp=2,schedule=dualpipev")
    assert layout.check_batch(6, 1, 64) == 3
    assert (layout.schedule_for(3), layout.schedule_for(4)) == ("zbv", "dualpipev")
    assert ParallelConfig.parse("pp=2,schedule=zb1p").schedule_for(1) == "zb1p"

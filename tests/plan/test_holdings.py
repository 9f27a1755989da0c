"""What ranks hold adds up to the model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.config.manifest import parameters
from benthic.config.parallel import ParallelConfig
from benthic.plan.holdings import layer_holding, pipeline_rank, stages_of_rank, whole_model
from benthic.plan.pipeline import cut
from tests.plan.configs import configs

V3 = ModelConfig.from_pretrained("deepseek-v3")


@given(configs())
@settings(max_examples=30, deadline=None)
def test_one_rank_holds_every_parameter_once(config):
    held = whole_model(config, ParallelConfig())
    assert held.elements + held.buffers == sum(row.size for row in parameters(config))
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    rank = pipeline_rank(config, ParallelConfig(), [range(layers)], 0)
    assert rank.total == held
    assert rank.largest_layer == max(layer_holding(config, ParallelConfig(), layer).elements for layer in range(layers))


@pytest.mark.parametrize(
    "text", ["pp=16", "pp=16,schedule=dualpipe", "pp=16,schedule=dualpipev", "pp=4,vp=4,schedule=interleaved"]
)
def test_pipeline_ranks_hold_the_model_once_and_dualpipe_twice(text):
    layout = ParallelConfig.parse(text)
    stages = cut([1.0] * 62, layout.stages)
    ranks = [pipeline_rank(V3, layout, stages, rank) for rank in range(layout.pipeline)]
    copies = 2 if layout.schedule == "dualpipe" else 1
    assert sorted(layer for rank in ranks for layer in rank.layers) == sorted(list(range(62)) * copies)
    # What predicts on the last stage is passed the embedding's rows, not the embedding.
    assert sum(rank.total.elements for rank in ranks) == copies * whole_model(V3, layout).elements


def test_a_head_that_is_the_embedding_is_on_the_first_rank_and_on_the_last():
    tied = V3.replace(tie_word_embeddings=True)
    layout = ParallelConfig(pipeline=2)
    ranks = [pipeline_rank(tied, layout, cut([1.0] * 62, 2), rank) for rank in range(2)]
    assert sum(rank.total.elements for rank in ranks) == whole_model(tied, layout).elements + 129280 * 7168


@given(tensor=st.sampled_from([1, 2, 4]), expert=st.sampled_from([1, 2, 8, 64]))
def test_tensor_ranks_share_matrices_and_expert_ranks_share_experts(tensor, expert):
    layout = ParallelConfig(shard=64, tensor=tensor, expert=expert)
    alone, held = whole_model(V3, ParallelConfig()), whole_model(V3, layout)
    assert held.routed * expert == alone.routed
    assert alone.dense / tensor <= held.dense <= alone.dense
    assert held.sharded(layout) == held.dense / 64 + held.routed / layout.expert_shards


def test_bidirectional_ranks_hold_mirrored_stages():
    dual, folded = ParallelConfig(pipeline=8, schedule="dualpipe"), ParallelConfig(pipeline=4, schedule="dualpipev")
    assert [stages_of_rank(dual, rank) for rank in (0, 7)] == [[0, 7], [7, 0]]
    assert [stages_of_rank(folded, rank) for rank in (0, 3)] == [[0, 7], [3, 4]]

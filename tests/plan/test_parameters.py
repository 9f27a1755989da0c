"""Parameter counts: the published ones, the manifest's, and what must hold for any model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.config import ModelConfig
from benthic.config.manifest import parameters, stored_tensors
from benthic.config.published import preset_names
from benthic.model import LanguageModel
from benthic.plan.parameters import (
    PARTS,
    count_parameters,
    repeated_parameters,
    row_bytes,
    stored_bytes,
    stored_format,
    weight_bytes,
)
from tests.plan.configs import SMALL, configs, drawn

PUBLISHED = {
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "moonlight-16b-a3b": (15_960_110_208, 2_914_776_192, 2_579_231_872),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_and_active_parameters_are_the_published_ones(name):
    count = count_parameters(ModelConfig.from_pretrained(name))
    assert (count.total, count.active, count.active_without_input_embedding) == PUBLISHED[name]


def test_v3_by_part():
    count = count_parameters(ModelConfig.from_pretrained("deepseek-v3"))
    assert count.embedding == count.head == 926_679_040
    assert count.attention == 61 * 187_107_328
    assert count.dense == 3 * (583_483_392 - 187_107_328 - 2 * 7168)
    assert count.mtp_unique == 11_610_068_224
    assert count.mtp_stored == 13_463_426_304
    assert count.stored == 684_489_845_504


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "olmo2-7b", *SMALL])
def test_counts_equal_the_model_on_the_meta_device(name):
    config = SMALL.get(name) or ModelConfig.from_pretrained(name)
    model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))]
    count = count_parameters(config)
    assert sum(tensor.numel() for tensor in tensors) == count.total + count.mtp_unique


@pytest.mark.parametrize("name", preset_names())
def test_folding_equal_layers_loses_nothing(name):
    config = ModelConfig.from_pretrained(name)
    rows = list(parameters(config))
    folded = repeated_parameters(config)
    assert sum(one.count for one in folded) == len(rows)
    assert sum(one.count * one.row.size for one in folded) == sum(row.size for row in rows)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "moonlight-16b-a3b", "llama-3.1-405b"])
def test_stored_elements_are_those_of_the_checkpoint(name):
    config = ModelConfig.from_pretrained(name)
    assert count_parameters(config).stored == sum(tensor.size for tensor in stored_tensors(config))


def test_stored_elements_of_a_small_v3_count_the_copies():
    config = SMALL["v3"]
    assert count_parameters(config).stored == sum(tensor.size for tensor in stored_tensors(config))


@drawn
@given(configs())
def test_parts_add_up_and_active_is_at_most_total(config):
    count = count_parameters(config)
    assert sum(getattr(count, part) for part in PARTS) == count.total
    assert 0 < count.active_without_input_embedding <= count.active <= count.total
    assert count.mtp_unique <= count.mtp_stored
    assert count.total + count.mtp_unique == sum(row.size for row in parameters(config))


GROWING = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "moe_intermediate_size"]


@drawn
@given(configs(), st.sampled_from([*GROWING, "kv_lora_rank", "v_head_dim", "n_shared_experts", "n_routed_experts"]))
def test_no_size_can_grow_without_the_total_growing(config, name):
    size = getattr(config, name)
    if size is None or (name in ("n_shared_experts", "moe_intermediate_size") and not config.n_routed_experts):
        return
    before, after = (count_parameters(one).total for one in (config, config.replace(**{name: 2 * size + 2})))
    # A layer that routes has no use for the dense width, and experts may have no layer of their own.
    unused = name in ("intermediate_size", "moe_intermediate_size", "n_shared_experts", "n_routed_experts")
    assert after >= before if unused else after > before


@drawn
@given(configs())
def test_more_chosen_experts_make_more_active_and_no_more_parameters(config):
    if not config.num_expert_layers or config.num_experts_per_tok == config.n_routed_experts:
        return
    more = count_parameters(config.replace(num_experts_per_tok=config.num_experts_per_tok + 1))
    count = count_parameters(config)
    assert more.total == count.total
    assert more.active > count.active


def test_v3_weights_in_bytes():
    config = ModelConfig.from_pretrained("deepseek-v3")
    assert stored_format(config) == "fp8"
    assert weight_bytes(config, "bf16") == 2 * 671_026_419_200 + 2 * 58 * 256
    assert weight_bytes(config, "fp32") == 4 * 671_026_419_200
    assert 688.5e9 < stored_bytes(config, "fp8") < 688.6e9


def test_a_begun_block_has_a_whole_scale():
    config = ModelConfig.from_pretrained("deepseek-v3")
    row = next(row for row in parameters(config) if row.name.endswith("kv_a_proj_with_mqa.weight"))
    assert row.shape == (576, 7168)
    assert row_bytes(config, row, "fp8") == 576 * 7168 + 4 * 5 * 56


@pytest.mark.parametrize("name", SMALL)
def test_bytes_grow_with_the_width_of_the_format(name):
    assert weight_bytes(SMALL[name], "fp8") < weight_bytes(SMALL[name], "bf16") < weight_bytes(SMALL[name], "fp32")

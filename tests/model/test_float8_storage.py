"""A model that keeps its matrices in FP8 says what the same model says with those matrices given back."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ConfigError
from benthic.model import LanguageModel
from benthic.model.float8_storage import storage, store_in_float8
from benthic.numerics.compare import assert_close
from benthic.numerics.reference.quantisation import dequantise_blocks, quantise_blocks
from tests.model.configs import CONFIGS, randomised, tiny, tokens

WIDE = {"hidden_size": 160, "intermediate_size": 144, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
WIDE |= {"qk_rope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 128, "head_dim": 32}


def wide(name, **changes):
    """A config of CONFIGS with widths that FP8 takes, ragged in blocks of 128."""
    known = CONFIGS[name]
    own = {key: value for key, value in WIDE.items() if key in known or key in ("hidden_size", "intermediate_size")}
    return tiny(**(known | own | changes))


def given_back(model):
    """A plain model with the numbers that FP8 leaves of `model`'s matrices."""
    copy = LanguageModel(model.config)
    copy.load_state_dict(model.state_dict())
    for row, reason in storage(model.config):
        if reason is None:
            weight = copy.get_parameter(row.name).data
            for matrix in weight if weight.ndim == 3 else [weight]:
                matrix.copy_(dequantise_blocks(*quantise_blocks(matrix)))
    return copy


@pytest.mark.parametrize("name", ["v3", "v3 of two predictions", "v2 with yarn", "grouped-query with biases"])
@torch.no_grad()
def test_matrices_in_fp8_give_what_their_numbers_give(name):
    model = randomised(wide(name))
    plain, ids = given_back(model), tokens(model.config, 2, 20)
    expected = plain(ids, return_mtp=True)
    store_in_float8(model)
    found = model(ids, return_mtp=True)
    assert_close(found[0], expected[0], "model_fp32")
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert_close(mine, theirs, "model_fp32")


def test_what_is_kept_in_fp8_is_what_is_published_so_but_for_the_latents_expansion(caplog):
    model = randomised(wide("v3"))
    with caplog.at_level("INFO", logger="benthic"):
        store_in_float8(model)
    found = {name for name, one in model.named_parameters() if one.dtype == torch.float8_e4m3fn}
    assert found == {row.name for row, _ in storage(model.config) if not row.name.endswith("kv_b_proj.weight")}
    assert "4 kept in torch.float32: kv_b_proj, whose halves are used head by head" in caplog.text
    scales = model.model.layers[1].mlp.experts.gate_up_proj_scale_inv
    assert scales.shape == (8, 2, 2)
    assert model.model.layers[0].self_attn.o_proj.weight_scale_inv.shape == (2, 1)


def test_widths_that_do_not_fit_stay_and_the_log_says_why(caplog):
    model = randomised(wide("v3", moe_intermediate_size=48))
    with caplog.at_level("INFO", logger="benthic"):
        store_in_float8(model)
    assert "a factor would reach across gate and up: moe_intermediate_size 48 is no multiple of 128" in caplog.text
    with pytest.raises(ConfigError, match="no matrix of this model can be kept in float8: widths of"):
        store_in_float8(randomised(tiny(hidden_size=24)))

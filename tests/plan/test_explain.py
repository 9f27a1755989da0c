"""Every explanation is an expression whose value is the figure."""

import pytest
from hypothesis import given

from benthic.config import ModelConfig
from benthic.config.published import preset_names
from benthic.plan.explain import explain_model
from benthic.plan.kv_cache import CACHE_FORMATS
from tests.plan.configs import configs, drawn


@drawn
@given(configs())
def test_the_numbers_of_any_model_evaluate_to_its_figures(config):
    for line in explain_model(config, sequence_length=37, context=19):
        assert eval(line.numbers) == pytest.approx(line.value, rel=1e-12), line


@pytest.mark.parametrize("name", preset_names())
def test_the_numbers_of_presets_evaluate_to_their_figures(name):
    for line in explain_model(ModelConfig.from_pretrained(name)):
        assert eval(line.numbers) == pytest.approx(line.value, rel=1e-12), line


@pytest.mark.parametrize("cache", CACHE_FORMATS)
def test_every_cache_format_is_explained(cache):
    lines = explain_model(ModelConfig.from_pretrained("deepseek-v3"), cache=cache)
    line = next(line for line in lines if line.name == f"bytes in {cache}")
    assert eval(line.numbers) == line.value


def test_v3_lines_read_as_in_the_papers():
    lines = {line.name: line for line in explain_model(ModelConfig.from_pretrained("deepseek-v3"))}
    assert lines["MLA (this model)"].formula == "(C + R)*L"
    assert lines["MLA (this model)"].numbers == "(512 + 64)*61"
    assert lines["as MHA"].numbers == "128*(128 + 128)*61"
    assert lines["training, causal"].formula == "3*(2*P + 2*L*S/2*H*(d+v))"

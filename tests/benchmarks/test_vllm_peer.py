"""vLLM is given the work of our result, and its figures are computed as ours are."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from benchmarks import vllm_peer
from benchmarks.decode import Workload
from benthic.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    return str(tmp_path)


def test_lengths_and_sizes_are_those_of_the_workload(folder):
    given = vllm_peer.arguments(Workload(model=folder, batches=(1, 32), prompt_tokens=100, new_tokens=28).model_dump())
    assert given["model"] == folder
    assert given["max_num_seqs"] == 32
    assert given["max_model_len"] == 192
    assert given["dtype"] == "bfloat16"
    assert not given["enable_prefix_caching"]
    assert "speculative_config" not in given


def test_an_acceptance_a_draft_is_a_mean_length_for_vllm(folder):
    for drafts, length in ((1, 1.88), (2, 1 + 0.88 + 0.88**2)):
        workload = Workload(model=folder, draft_tokens=drafts, acceptance=0.88).model_dump()
        speculative = vllm_peer.arguments(workload)["speculative_config"]
        assert speculative["num_speculative_tokens"] == drafts
        assert speculative["synthetic_acceptance_length"] == pytest.approx(length)


def test_what_cannot_be_compared_is_refused(folder):
    with pytest.raises(ConfigError, match="measured on tiny, which holds no weights"):
        vllm_peer.arguments(Workload(model="tiny").model_dump())
    with pytest.raises(ConfigError, match="plain weights and a plain cache"):
        vllm_peer.arguments(Workload(model=folder, cache="float8").model_dump())


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is here")
def test_a_python_without_vllm_is_told(tmp_path):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"workload": Workload().model_dump()}))
    with pytest.raises(ConfigError, match="this Python has no vllm"):
        vllm_peer.beside(path)


def test_figures_are_medians_without_the_prompts_part():
    workload = Workload(prompt_tokens=512, new_tokens=101).model_dump()
    row = vllm_peer.row(workload, 8, [(0.5, 1.0), (1.0, 3.0), (2.0, 9.0)])
    assert row["ms_per_token"] == pytest.approx(20)
    assert row["tokens_per_second"] == pytest.approx(400)
    assert row["prompt_tokens_per_second"] == pytest.approx(4096)

"""load_model and save_model against transformers, family by family, and their own errors."""

import logging

import pytest
import torch
import transformers

import benthic
from benthic.errors import CapacityError, CheckpointError, ConfigError
from benthic.inference import pretrained
from benthic.model import LanguageModel, initialise
from benthic.numerics.compare import assert_close
from tests.checkpoint.folders import TINY
from tests.model.families import FAMILIES, VOCABULARY, oracle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tokens(vocabulary=VOCABULARY):
    return torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    model = LanguageModel(TINY).eval()
    initialise(model, seed=3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_folders_load_here_and_ours_load_there(tmp_path, name):
    reference = oracle(name)
    expected = reference(tokens()).logits
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = benthic.load_model(tmp_path / "theirs")
    assert not model.training
    assert_close(model(tokens()), expected, "model_fp32")

    benthic.save_model(model, tmp_path / "ours", weights="fp32", max_shard_bytes=60_000)
    again, report = type(reference).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert_close(again.eval()(tokens()).logits, expected, "model_fp32")


@torch.no_grad()
def test_only_the_prediction_layer_is_foreign_to_transformers(tmp_path, model):
    benthic.save_model(model, tmp_path, weights="fp32")
    theirs, report = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"]
    assert all(name.startswith("model.layers.2.") for name in report["unexpected_keys"])
    assert not any(report[kind] for kind in report if kind != "unexpected_keys")
    assert_close(theirs.eval()(tokens(61)).logits, model(tokens(61)), "model_fp32")


@torch.no_grad()
def test_prediction_layers_come_back(tmp_path, model):
    benthic.save_model(model, tmp_path, weights="fp32")
    again = benthic.load_model(tmp_path)
    (logits, mtp), (logits_again, mtp_again) = (one(tokens(61), return_mtp=True) for one in (model, again))
    assert torch.equal(logits, logits_again)
    assert torch.equal(mtp[0], mtp_again[0])


@torch.no_grad()
def test_a_folder_that_transformers_wrote_over_ours_loads_without_its_prediction_layer(tmp_path, model, caplog):
    benthic.save_model(model, tmp_path / "ours", weights="fp32")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, "benthic"):
        again = benthic.load_model(tmp_path / "theirs")
    assert "it is taken as the main model alone" in caplog.text
    assert again.config.num_nextn_predict_layers == 0
    assert torch.equal(again(tokens(61)), model(tokens(61)))


@torch.no_grad()
def test_fp8_and_bf16_folders_compute_nearly_the_same(tmp_path, model):
    expected = model(tokens(61))
    for weights, bound in (("bf16", 0.01), ("fp8", 0.08)):
        benthic.save_model(model, tmp_path / weights, weights=weights)
        found = benthic.load_model(tmp_path / weights, dtype=torch.float32)(tokens(61))
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers dequantises on machines without a GPU alone")
@pytest.mark.parametrize("power_of_two_scales", [False, True])
@torch.no_grad()
def test_transformers_dequantises_our_fp8_to_the_same_model(tmp_path, power_of_two_scales):
    # Rows are whole blocks, or fit one: transformers 5.23 fails on ragged scales.
    even = {"hidden_size": 256, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
    config = TINY.replace(**even, moe_intermediate_size=128, intermediate_size=256, num_nextn_predict_layers=0)
    model = LanguageModel(config)
    initialise(model, seed=1)
    benthic.save_model(model, tmp_path, weights="fp8", power_of_two_scales=power_of_two_scales)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = benthic.load_model(tmp_path, dtype=torch.float32)
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        rounded = tensor.bfloat16().float() if state[name].dtype == torch.bfloat16 else tensor
        assert_close(state[name].float(), rounded, "operation_fp32", name)


def test_dtype_defaults_to_the_one_of_config_json(tmp_path, model):
    benthic.save_model(model, tmp_path)
    assert benthic.load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert benthic.load_model(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    bias = benthic.load_model(tmp_path).model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


def test_a_dtype_that_cannot_compute_is_refused(tmp_path, model):
    benthic.save_model(model, tmp_path)
    with pytest.raises(ConfigError, match=r"dtype is torch.float8_e4m3fn; a model computes in"):
        benthic.load_model(tmp_path, dtype=torch.float8_e4m3fn)


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder(.|\n)*hf download OWNER/NAME"):
        benthic.load_model(tmp_path / "nothing")


def test_too_large_a_model_is_refused_before_memory_is_taken(tmp_path, model, monkeypatch):
    benthic.save_model(model, tmp_path)
    monkeypatch.setattr(pretrained, "available_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"the model needs 0.0 GiB in torch.bfloat16; cpu has 0.0 GiB available"):
        benthic.load_model(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (None, "device is None; it must be the name of one"),
        ("meta", "device is 'meta', which holds no weights to compute with"),
    ],
)
def test_a_device_that_cannot_compute_is_refused(device, message, tmp_path, model):
    benthic.save_model(model, tmp_path)
    for make in (benthic.load_model, benthic.Engine):
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, device=device)


def test_an_engine_of_a_model_without_weights_is_refused(model):
    with pytest.raises(ConfigError, match="the model is on device 'meta', which holds no weights"):
        benthic.Engine(LanguageModel(model.config, device="meta"))


def test_a_device_that_is_none_is_refused(tmp_path, model):
    benthic.save_model(model, tmp_path)
    with pytest.raises(ConfigError, match=r"device is 'gpu': (.|\n)*use 'cpu', 'cuda' or 'cuda:1'"):
        benthic.load_model(tmp_path, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_clear_error(tmp_path, model):
    benthic.save_model(model, tmp_path)
    with pytest.raises(CapacityError, match=r"torch finds no CUDA GPU(.|\n)*use device='cpu'"):
        benthic.load_model(tmp_path, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8"])
def test_a_gpu_writes_the_bytes_that_the_cpu_writes_and_loads_them(tmp_path, model, weights):
    benthic.save_model(model, tmp_path / "cpu", weights=weights)
    benthic.save_model(model.cuda(), tmp_path / "cuda", weights=weights)
    name = "model.safetensors"
    assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()
    loaded = benthic.load_model(tmp_path / "cuda", device="cuda", dtype=torch.float32).state_dict()
    for path, tensor in benthic.load_model(tmp_path / "cpu", dtype=torch.float32).state_dict().items():
        assert torch.equal(loaded[path].cpu(), tensor), path

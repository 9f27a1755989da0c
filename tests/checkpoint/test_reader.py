"""Reading: every stored dtype, scales anywhere, copies compared, and the memory it takes."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.checkpoint import load_into, open_checkpoint, read_weights, write_checkpoint
from benthic.checkpoint.folder import INDEX, WEIGHTS
from benthic.config.manifest import parameters
from benthic.errors import CheckpointError
from tests.checkpoint.folders import TINY, Bag, random_tensors

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def loaded(folder, dtype=torch.float32):
    checkpoint = open_checkpoint(folder)
    bag = Bag(checkpoint.config, dtype)
    load_into(bag, checkpoint)
    return bag.state_dict()


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path / "model", "fp32")
    return tmp_path / "model"


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_stored_dtype_fills_every_module_dtype(folder, stored, wanted):
    edit(folder, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    expected = random_tensors(TINY)
    for name, tensor in loaded(folder, wanted).items():
        assert tensor.dtype == (torch.float32 if name == BIAS or "correction" in name else wanted)
        assert torch.equal(tensor, expected[name].to(stored).to(tensor.dtype)), name


def test_the_routing_bias_stays_float32_and_exact(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, "bf16")
    assert load_file(tmp_path / WEIGHTS)[BIAS].dtype == torch.float32
    assert torch.equal(loaded(tmp_path, torch.bfloat16)[BIAS], random_tensors(TINY)[BIAS])


def test_a_module_with_a_rounded_routing_bias_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"e_score_correction_bias.* must be float32 in the module"):
        load_into(Bag(TINY).to(torch.bfloat16), folder)


def test_a_module_of_another_config_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"1 differ: lm_head.weight"):
        load_into(Bag(TINY.replace(tie_word_embeddings=True)), folder)


def test_weights_are_refilled_in_place(folder):
    bag = Bag(TINY)
    before = {name: tensor.data_ptr() for name, tensor in bag.state_dict().items()}
    load_into(bag, folder)
    assert {name: tensor.data_ptr() for name, tensor in bag.state_dict().items()} == before


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_any_dtype_in_any_shard_are_found(tmp_path, scale_dtype):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, "fp8", power_of_two_scales=True)
    expected = loaded(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    scales = {name: tensors.pop(name).to(scale_dtype) for name in list(tensors) if name.endswith("_scale_inv")}
    assert scales
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    save_file(scales, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(scales, "model-00002-of-00002.safetensors")
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = loaded(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_come_dequantised_and_duplicates_last(tmp_path):
    write_checkpoint(random_tensors(TINY), TINY, tmp_path, "fp8")
    rows = []
    for row, tensor in read_weights(open_checkpoint(tmp_path)):
        assert tensor.dtype != torch.float8_e4m3fn
        assert tuple(tensor.shape) == row.shape
        rows.append(row)
    assert [row.duplicate for row in rows] == sorted(row.duplicate for row in rows)


def test_a_differing_copy_of_the_embedding_is_told(folder, caplog):
    edit(folder, lambda tensors: tensors["model.layers.2.embed_tokens.weight"].add_(1))
    with caplog.at_level(logging.WARNING, "benthic"):
        found = loaded(folder)
    assert "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight" in caplog.text
    assert "shared_head" not in caplog.text
    assert torch.equal(found["model.embed_tokens.weight"], random_tensors(TINY)["model.embed_tokens.weight"])


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    tied = TINY.replace(tie_word_embeddings=True)
    write_checkpoint(random_tensors(tied), tied, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(61, 160)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs(.|\n)*set tie_word_embeddings to false"):
        loaded(tmp_path)


MEASURE = """
import sys, torch
from benthic.checkpoint.conversion import convert
from benthic.checkpoint.reader import load_into, open_checkpoint
from benthic.config.manifest import parameters
from tests.checkpoint.folders import Bag

def peak():
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

task, folder = sys.argv[1:]
checkpoint = open_checkpoint(folder)
torch.ones(300, 300) @ torch.ones(300, 300)
before = peak()
if task == "load":
    load_into(Bag(checkpoint.config, torch.bfloat16), checkpoint)
else:
    convert(folder, folder + "-converted", task)
print(peak() - before)
"""


def peak_of(*arguments):
    """Resident bytes that a task adds in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("weights", "max_shard_bytes"), [("bf16", 10**8), ("bf16", 10**10), ("fp8", 10**10)])
def test_loading_takes_the_model_and_less_than_a_shard_and_converting_takes_little(tmp_path, weights, max_shard_bytes):
    wide = TINY.replace(hidden_size=1024, n_routed_experts=16, moe_intermediate_size=2048, vocab_size=10_000)
    tensors = {row.name: torch.full(row.shape, 0.5) for row in parameters(wide)}
    write_checkpoint(tensors, wide, tmp_path, weights, max_shard_bytes=max_shard_bytes)
    del tensors
    model = 2 * sum(row.size for row in parameters(wide))
    assert model > 400 * 10**6
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    loading = peak_of("load", str(tmp_path))
    assert model * 0.9 < loading < model + largest
    # One file is not mapped whole either.
    assert loading < model + 220 * 2**20
    assert peak_of("bf16" if weights == "fp8" else "fp8", str(tmp_path)) < 220 * 2**20

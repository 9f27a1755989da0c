"""torchtitan is given the same model, a text of its own, and its figures are read from what it prints."""

from __future__ import annotations

import json
import sys
import tomllib

import pytest
import tokenizers

from benchmarks import torchtitan_peer as peer
from benchmarks.train_arms import ARMS, Arm, model_config
from benthic.config.model import ModelConfig
from benthic.errors import RunError

LINE = "- INFO - step: {step:2}  loss: 11.02  grad_norm:  1.5  memory: {memory}GiB(60%)  tps: {tps}  tflops: 1  mfu: 2%"


def log(*rows):
    return "\n".join(LINE.format(step=step, memory=memory, tps=tps) for step, memory, tps in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    peer.prepare(folder, Arm(trainer="torchtitan", model="tiny", batch=1, sequence_length=16, states="bfloat16"))
    return folder


def test_the_job_states_what_the_arm_says(folder):
    job = tomllib.loads((folder / "job.toml").read_text())
    assert job["training"]["local_batch_size"] == 1
    assert job["training"]["seq_len"] == 16
    assert job["training"]["steps"] == 25
    assert job["training"]["dtype"] == "bfloat16"
    assert job["activation_checkpoint"]["mode"] == "none"
    assert job["compile"] == {"enable": True, "components": ["model", "loss"]}
    assert job["debug"]["moe_force_load_balance"] is True
    assert job["experimental"]["custom_import"] == "benchmarks.torchtitan_flavour"


def test_every_word_of_the_text_is_one_token_of_the_vocabulary(folder):
    config = model_config("tiny")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size
    texts = [json.loads(line)["text"] for line in (folder / "corpus" / "data.json").read_text().splitlines()]
    ids = tokenizer.encode(texts[0]).ids
    assert len(ids) == len(texts[0].split()) == 100_000
    assert min(ids) >= 2
    assert max(ids) < config.vocab_size
    assert len(set(ids)) > 0.99 * (config.vocab_size - 2)
    assert len(texts) * len(ids) >= peer.STEPS * 17


def test_the_model_file_is_read_back_as_the_same_model(folder):
    assert ModelConfig.from_pretrained(folder / "model.json") == model_config("tiny")


def test_the_model_s_sizes_reach_torchtitan_s_names():
    found = peer.model_arguments(model_config("lite"), "flex")
    assert found["dim"] == 2048
    assert found["n_layers"] == 8
    assert found["n_dense_layers"] == 1
    assert found["q_lora_rank"] == 0
    assert found["moe_args"]["num_experts"] == 64
    assert found["moe_args"]["num_shared_experts"] == 2
    assert found["moe_args"]["score_func"] == "sigmoid"
    assert found["moe_args"]["route_norm"] is True
    assert found["attn_mask_type"] == "block_causal"
    assert peer.model_arguments(model_config("v3"), "sdpa")["q_lora_rank"] == 1536


def test_speed_is_that_of_steps_15_to_25():
    text = log(
        (1, 40, "900"),
        (5, 50, "9,000"),
        (10, 50, "10,000"),
        (15, 50, "20,000"),
        (20, 51.5, "40,000"),
        (25, 51.25, "60,000"),
    )
    found = peer.read_log(text)
    assert found["tokens_per_second"] == pytest.approx(48_000)  # 2 / (1/40000 + 1/60000): equal tokens each
    assert found["memory"] == {"reserved_gib": 51.5}
    assert found["loss"] == 11.02


def test_colours_do_not_hide_the_figures():
    plain = log((20, 51.5, "40,000"), (25, 51.25, "40,000"))
    assert (
        peer.read_log(plain.replace("loss", "\x1b[32mloss").replace("tps", "\x1b[36mtps"))["tokens_per_second"]
        == 40_000
    )


def test_a_run_that_ended_early_is_an_error_with_its_last_words():
    with pytest.raises(RunError, match=r"(?s)before step 25: .*OutOfMemoryError"):
        peer.read_log(log((5, 50, "9,000")) + "\ntorch.OutOfMemoryError: CUDA out of memory")


def test_it_is_started_alone_offline_and_can_import_the_flavour(tmp_path):
    environment = peer.environment(tmp_path, tmp_path / "checkout", ARMS["torchtitan"])
    assert environment["WORLD_SIZE"] == "1"
    assert environment["HF_DATASETS_OFFLINE"] == "1"
    assert environment["PYTHONPATH"].split(":")[0] == str(tmp_path / "checkout")
    assert environment[peer.MODEL_FILE] == str(tmp_path / "model.json")
    assert peer.command() == [sys.executable, "-m", "torchtitan.train", "--job.config_file", "job.toml"]


def test_several_ranks_share_experts_and_read_as_many_texts_more(tmp_path):
    peer.prepare(tmp_path, Arm(trainer="torchtitan", model="tiny", batch=1, sequence_length=8192), 2)
    job = tomllib.loads((tmp_path / "job.toml").read_text())
    assert job["parallelism"] == {"data_parallel_shard_degree": -1, "expert_parallel_degree": 2}
    texts = (tmp_path / "corpus" / "data.json").read_text().splitlines()
    assert len(texts) * 100_000 >= 2 * peer.STEPS * 8193
    command = peer.command(2)
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[-3:] == ["torchtitan.train", "--job.config_file", "job.toml"]

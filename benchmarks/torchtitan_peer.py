"""torchtitan 0.2.2 on the same model, batch and GPUs: what it is given to read, how it is started, what it reports.

Its balanced routing is forced, and its own figure (`tps`, of a GPU) is averaged over steps 15 to 25, when compilation
is over. On several ranks weights are split over all of them (FSDP2), and experts too (its expert parallelism).
Documents are longer than a sequence, so that its document mask leaves causal attention whole, as ours is.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.train_arms import Arm, model_config
from benthic.config.model import ModelConfig
from benthic.config.published import config_to_published
from benthic.errors import RunError

FLAVOUR = "benthic_bench"
MODEL_FILE = "BENTHIC_BENCH_MODEL"
"""The environment variable that tells torchtitan_flavour.py which published config to register."""
STEPS, FIRST_COUNTED, LOG_EVERY = 25, 15, 5
SPECIAL = ("<bos>", "<eos>")
MODULES = ("torchtitan", "torchdata", "datasets", "tyro", "tokenizers")


def missing() -> list[str]:
    """Packages that the peer needs and this Python lacks."""
    return [name for name in MODULES if find_spec(name) is None]


def prepare(folder: Path, arm: Arm, ranks: int = 1) -> None:
    """Write the tokenizer, the text, the model's config and the job, all in `folder`. `arm.batch` is a rank's."""
    config = model_config(arm.model)
    tokens = STEPS * ranks * arm.batch * (arm.sequence_length + 1)
    write_tokenizer(folder / "tokenizer", config.vocab_size)
    write_text(folder / "corpus", config.vocab_size, tokens * 3 // 2, arm.seed)
    (folder / "model.json").write_text(json.dumps(config_to_published(config)))
    (folder / "job.toml").write_text(job(arm, ranks))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token a word: `w0`, `w1` ... as many as the vocabulary has room for."""
    folder.mkdir(parents=True)
    words = [*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL)))]
    special = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, word in enumerate(SPECIAL)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": SPECIAL[1]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1],
            "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in special},
        })
    )  # fmt: skip


def write_text(folder: Path, vocabulary: int, tokens: int, seed: int) -> None:
    """Words drawn evenly, in documents of 100,000."""
    folder.mkdir(parents=True)
    stream = random.Random(seed)
    with (folder / "data.json").open("w", encoding="utf-8") as file:
        for _ in range(-(-tokens // 100_000)):
            numbers = stream.choices(range(vocabulary - len(SPECIAL)), k=100_000)
            file.write(json.dumps({"text": " ".join(f"w{number}" for number in numbers)}) + "\n")


def job(arm: Arm, ranks: int = 1) -> str:
    """torchtitan's job file; its paths are relative to the folder that it runs in."""
    sections = {
        "job": {"dump_folder": "out", "description": "benthic's benchmark"},
        "metrics": {"log_freq": LOG_EVERY, "disable_color_printing": True},
        "model": {"name": "deepseek_v3", "flavor": FLAVOUR, "hf_assets_path": "tokenizer"},
        "experimental": {"custom_import": "benchmarks.torchtitan_flavour"},
        "optimizer": {"name": "AdamW", "lr": 2.2e-4},
        "lr_scheduler": {"warmup_steps": 2},
        "training": {
            "dataset": "c4_test", "dataset_path": "corpus", "local_batch_size": arm.batch,
            "seq_len": arm.sequence_length, "max_norm": 1.0, "steps": STEPS, "dtype": arm.states,
        },
        "parallelism": {"data_parallel_shard_degree": -1, "expert_parallel_degree": ranks},
        "activation_checkpoint": {"mode": "none"},
        "compile": {"enable": True, "components": ["model", "loss"]},
        "checkpoint": {"enable": False},
        "debug": {"moe_force_load_balance": True, "seed": arm.seed},
    }  # fmt: skip
    # JSON's strings, numbers, truth values and flat lists are TOML's too.
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    )


def command(ranks: int = 1) -> list[str]:
    """How it is started, in its folder; of several ranks the first one's lines are printed."""
    job = ["-m", "torchtitan.train", "--job.config_file", "job.toml"]
    if ranks == 1:
        return [sys.executable, *job]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *together, "--local-ranks-filter", "0", *job]


def environment(folder: Path, root: Path, arm: Arm) -> dict[str, str]:
    """One rank of one, unless torchrun says otherwise; offline, with benthic importable for the flavour."""
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    return os.environ | {
        "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), MODEL_FILE: str(folder / "model.json"),
        "BENTHIC_BENCH_ATTENTION": arm.attention,
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def read_log(text: str) -> dict[str, Any]:
    """A GPU's speed over steps 15 to 25 and the highest reserved memory in it, from what torchtitan printed.

    Each line tells the speed since the line before, so the first counted one starts at step 16. Raises RunError where
    the run did not get there.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = re.findall(r"step:\s*(\d+)\s.*?loss:\s*([\d.naif]+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+)", plain)
    counted = [one for one in lines if int(one[0]) > FIRST_COUNTED]
    if not counted or int(counted[-1][0]) != STEPS:
        raise RunError(f"torchtitan ended before step {STEPS}: {plain.strip()[-1500:] or 'it printed nothing'}")
    speeds = [int(speed.replace(",", "")) for *_, speed in counted]
    return {
        # Equal numbers of tokens each: the mean speed is the harmonic one.
        "tokens_per_second": len(speeds) / sum(1 / speed for speed in speeds),
        "tokens_per_second_by_log": speeds,
        "loss": float(counted[-1][1]),
        "memory": {"reserved_gib": max(float(memory) for _, _, memory, _ in counted)},
    }


def model_arguments(config: ModelConfig, attention: str) -> dict[str, Any]:
    """torchtitan's DeepSeekV3ModelArgs of a config, its `moe_args` as a dictionary. YaRN stays off at 4,096 in both."""
    experts = {
        "num_experts": config.n_routed_experts, "num_shared_experts": config.n_shared_experts,
        "top_k": config.num_experts_per_tok, "score_func": config.scoring_func, "route_norm": config.norm_topk_prob,
        "route_scale": config.routed_scaling_factor, "score_before_experts": False,
    }  # fmt: skip
    return {
        "vocab_size": config.vocab_size, "dim": config.hidden_size, "inter_dim": config.intermediate_size,
        "moe_inter_dim": config.moe_intermediate_size, "n_layers": config.num_hidden_layers,
        "n_dense_layers": config.first_k_dense_replace, "n_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank or 0, "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim, "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim, "norm_eps": config.rms_norm_eps, "moe_args": experts,
        "attn_type": attention, "attn_mask_type": "block_causal" if attention == "flex" else "causal",
    }  # fmt: skip
